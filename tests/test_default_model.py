"""The model in the package: what its card says, and sparse decoding on it."""

import jax
import numpy as np
import pytest

import jsparse
from jsparse.checkpoints.open import DEFAULT_MODEL
from jsparse.evaluation.scoring import held_out_rows, read_lines, teacher_forced
from jsparse.executors.select import select_executor


@pytest.fixture(scope="module")
def fitted(default):
    return jsparse.fit_predictors(default, (DEFAULT_MODEL / "calibration.txt").read_text(), tokens=8_192)


def accuracy(params, predictors, rows):
    """Next-token accuracy, and the predicted, caught and active neurons."""
    hits, counts = [], 0
    for row in rows:
        log_p, layer_counts = teacher_forced(params.weights, predictors, row, params.config, select_executor())
        hits.append(np.mean(np.asarray(log_p)[:-1].argmax(-1) == row[1:]))
        counts = counts + np.asarray(layer_counts).sum(axis=0)
    return np.mean(hits), counts


def test_size_and_data(default):
    size = sum(file.stat().st_size for file in DEFAULT_MODEL.iterdir())
    parameters = sum(leaf.size for leaf in jax.tree.leaves(default.weights))
    assert size < 40e6
    assert 4e6 <= parameters <= 30e6
    tokens = len(default.tokenizer.encode((DEFAULT_MODEL / "calibration.txt").read_text()))
    assert 18_000 < tokens < 25_000
    calibration = (DEFAULT_MODEL / "calibration.txt").read_text()
    assert not any(entry["text"][:200] in calibration for entry in read_lines("held_out_code.jsonl"))
    problems = read_lines("held_out_arithmetic.jsonl")
    assert len({problem["prompt"] for problem in problems}) >= 500
    assert all(problem["solution"].endswith(f"answer {problem['answer']}\n\n") for problem in problems)
    assert not any(problem["prompt"] in calibration for problem in problems)


def test_digits_are_single_tokens(default):
    ids = default.tokenizer.encode("12345")
    assert len(ids) == 6
    assert default.tokenizer.decode(ids) == "12345"


def test_quality_dense_and_sparse(default, fitted):
    """Bounds well inside what the model card reports of all held-out text."""
    rows = held_out_rows(default, 8)
    dense, dense_counts = accuracy(default, None, rows)
    sparse, counts = accuracy(fitted, fitted.predictors, rows)
    pairs = rows.size * default.config.num_layers * default.config.intermediate_size
    assert dense > 0.44
    assert 1 - dense_counts[2] / pairs > 0.85
    assert sparse > dense * 0.985
    assert counts[0] / pairs < 0.25
    assert counts[1] / counts[2] > 0.7


def test_the_same_function_as_transformers(default):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(DEFAULT_MODEL, dtype=torch.float32)
    row = held_out_rows(default, 1)[0]
    ours, _ = teacher_forced(default.weights, None, row, default.config, select_executor())
    with torch.no_grad():
        expected = torch.log_softmax(theirs(torch.tensor(row[None])).logits[0], dim=-1).numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_sparse_generation_reads_a_fraction_of_the_rows(fitted):
    statistics = []
    problem = read_lines("held_out_arithmetic.jsonl")[0]
    text = jsparse.generate(fitted, problem["prompt"], max_new_tokens=40, on_finish=statistics.append)
    assert text
    assert 0 < statistics[0].rows_read < 0.35
