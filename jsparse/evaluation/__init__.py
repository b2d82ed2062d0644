"""How good a model's answers are, measured through the path that is deployed."""
