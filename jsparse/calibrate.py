"""`python -m jsparse.calibrate`: fit predictors for a model, once."""

from jsparse.cli.calibrate import main
from jsparse.predictors.texts import default_texts, read_prompts

__all__ = ["default_texts", "main", "read_prompts"]

if __name__ == "__main__":
    main()
