"""Calibration: honest reports, identical predictors after any interruption, the ablations, and the command."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import TINY, random_params, run_decoder
from tokenizer_files import byte_tokenizer

import jsparse
from jsparse.arrays import Rows
from jsparse.cli import calibrate
from jsparse.executors.xla import Xla
from jsparse.model.parameters import by_path, make_weights, parameters
from jsparse.model.weights import Linear
from jsparse.predictors import state as calibration_state
from jsparse.predictors.fit import CalibrationOptions, fit_layers, make_rows
from jsparse.predictors.texts import read_prompts
from jsparse.rounding import cast

SMALL = dataclasses.replace(TINY, hidden_size=32, intermediate_size=96, num_heads=2)
TOKENS = [np.random.default_rng(2).integers(0, SMALL.vocab_size, 900)]
OPTIONS = {"rank": 8, "sparsity": 0.8, "tokens": 800}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small() -> jsparse.Params:
    return random_params(SMALL)


def contents(params: jsparse.Params) -> list[bytes]:
    """The predictors, byte by byte."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params.predictors)]


@pytest.fixture(scope="module")
def uninterrupted(small) -> list[bytes]:
    return contents(jsparse.fit_predictors(small, TOKENS, **OPTIONS))


def fit(params, texts=TOKENS, **options):
    """Params with predictors, and the reports."""
    reports = []
    fitted = jsparse.fit_predictors(params, texts, on_layer=reports.append, **(OPTIONS | options))
    return fitted, reports


def ffn_inputs(params: jsparse.Params, rows: np.ndarray) -> list[np.ndarray]:
    """FFN inputs (tokens, D) of every layer over the second half of the rows, without their first position."""
    spec = params.config.ffn_spec()

    def feed_forward(layer, x, ffn):
        return Xla().dense_ffn(x, ffn, spec), x

    _, inputs = run_decoder(params, rows[len(rows) // 2 :], feed_forward)
    return [np.asarray(x)[:, 1:].reshape(-1, params.config.hidden_size) for x in inputs]


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "int8", "int4:32"])
def test_weights_of_every_storage_are_calibrated(small, storage):
    """To nearly what float32 gives."""
    table, leaves = parameters(small.config), by_path(small.weights)

    def leaf(path, _):
        if table[path].role in ("norm", "bias"):
            return leaves[path]
        return cast(leaves[path], "bfloat16" if table[path].role == "embed" and storage.startswith("int") else storage)

    _, wanted = fit(small)
    _, found = fit(dataclasses.replace(small, weights=make_weights(small.config, leaf)))
    for ours, exact in zip(found, wanted, strict=True):
        assert abs(ours.recall - exact.recall) < 0.05
        assert abs(ours.skipped - exact.skipped) < 0.05


@pytest.mark.parametrize(("kind", "threshold"), [("reglu", 0.0), ("drelu", 0.0), ("fatrelu", 0.3)])
@pytest.mark.parametrize("bos", [None, 5])
def test_reports_are_what_a_direct_computation_finds(kind, threshold, bos):
    config = dataclasses.replace(SMALL, ffn_kind=kind, ffn_threshold=threshold, bos_token_id=bos)
    params = random_params(config)
    fitted, reports = fit(params)
    rows = make_rows(params, TOKENS, CalibrationOptions(**OPTIONS))
    assert rows.size >= 790
    spec = config.ffn_spec()
    assert [report.layer for report in reports] == [0, 1, 2]
    for layer, (x, report) in enumerate(zip(ffn_inputs(params, rows), reports, strict=True)):
        weights, predictor = params.weights.layers[layer].ffn, fitted.predictors[layer]
        pairs = len(x) * config.intermediate_size
        active = oracle.ffn(x, weights, None, spec)[1][:, 1].sum()
        gate, up = x @ oracle.matrix(weights.gate).T, x @ oracle.matrix(weights.up).T
        fires = (gate > threshold) & ((up > 0) | (kind != "drelu"))
        np.testing.assert_allclose(predictor.rate, fires.mean(axis=0), rtol=0, atol=3 / len(x))
        kept, caught = oracle.ffn(x, weights, predictor, spec)[1].sum(axis=0)
        assert report.rank == 8
        assert report.sparsity == pytest.approx(1 - active / pairs, abs=3 / pairs)
        assert report.skipped == pytest.approx(1 - kept / pairs, abs=2e-3)
        assert report.recall == pytest.approx(caught / active, abs=2e-3)
        target = (0.8 - (0.1 if layer < 2 else 0)) * report.sparsity
        assert report.stopped_early or report.skipped == pytest.approx(target, abs=0.01)
        assert report.recall > 1 - report.skipped + 0.1, "no better than chance"
    expected = {"reglu": 0.5, "drelu": 0.75, "fatrelu": 0.6}[kind]
    assert reports[1].sparsity == pytest.approx(expected, abs=0.12)


def test_a_higher_rank_and_less_sparsity_recall_more(small):
    def recall(**options):
        return np.mean([report.recall for report in fit(small, bits=8, **options)[1]])

    by_rank = [recall(rank=rank) for rank in (2, 8, 32)]
    assert by_rank[0] + 0.05 < by_rank[1] < by_rank[2] - 0.02
    assert by_rank[2] > 0.97
    by_sparsity = [recall(sparsity=sparsity) for sparsity in (1.0, 0.8, 0.4)]
    assert by_sparsity[0] < by_sparsity[1] < by_sparsity[2]
    assert recall(sparsity=0.0) > 0.999


def test_bits(small):
    errors = []
    rows = make_rows(small, TOKENS, CalibrationOptions(**OPTIONS))
    x = ffn_inputs(small, rows)[2]
    for bits in (16, 8, 4):
        fitted, _ = fit(small, bits=bits, rank=32, bias="layer", refit=False)
        predictor = fitted.predictors[2]
        if bits == 16:
            assert predictor.a.dtype == predictor.b.dtype == jnp.bfloat16
        else:
            assert isinstance(predictor.a, Rows)
            assert predictor.a.storage.bits == predictor.b.storage.bits == bits
        assert predictor.a.shape == (32, 32)
        assert predictor.b.shape == (96, 32)
        scores = x @ oracle.matrix(predictor.a).T @ oracle.matrix(predictor.b).T
        gate = x @ oracle.matrix(small.weights.layers[2].ffn.gate).T
        errors.append(np.std((scores - scores.mean(0)) - (gate - gate.mean(0))) / gate.std())
    assert errors[0] < 0.01
    assert errors[1] < 0.02
    assert errors[1] < errors[2] < 0.2


def test_ranks_per_layer(small):
    fitted, reports = fit(small, rank=(4, 8, 16))
    assert [predictor.rank for predictor in fitted.predictors] == [4, 8, 16]
    assert [report.rank for report in reports] == [4, 8, 16]
    assert [predictor.b.shape for predictor in fitted.predictors] == [(96, 4), (96, 8), (96, 16)]
    same = fit(small, rank=8)[0]
    assert contents(fitted)[5:10] == contents(same)[5:10]


def test_the_default_rank_is_a_quarter_of_the_hidden_size(small):
    assert {predictor.rank for predictor in fit(small, rank=None)[0].predictors} == {8}


ABLATIONS = {
    "whiten": {"whiten": False},
    "center": {"center": False},
    "bias layer": {"bias": "layer"},
    "bias none": {"bias": "none"},
    "importance gate": {"importance": "gate"},
    "importance hidden": {"importance": "hidden"},
    "bits": {"bits": 8},
    "sparsity": {"sparsity": 0.5},
    "seed": {"seed": 1},
    "tokens": {"tokens": 500},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_option_changes_the_predictors(name, small, uninterrupted):
    fitted, reports = fit(small, **ABLATIONS[name])
    assert contents(fitted) != uninterrupted
    assert all(np.isfinite(r.recall) and 0 < r.recall <= 1 for r in reports)
    # An importance moves thresholds and nothing else.
    if name.startswith("importance"):
        assert contents(fitted)[:4] == uninterrupted[:4]
    if name.startswith("bias"):
        bias = np.asarray(fitted.predictors[2].bias)
        offset = np.asarray(fit(small, bias="none")[0].predictors[2].bias)
        assert np.ptp(bias - offset) < 1e-5


def test_layer_bias_reaches_its_target(small):
    for report in fit(small, bias="layer")[1]:
        target = (0.8 - (0.1 if report.layer < 2 else 0)) * report.sparsity
        assert report.skipped == pytest.approx(target, abs=0.005)


def test_neuron_thresholds_recall_more_importance_than_one_per_layer(small):
    rows = make_rows(small, TOKENS, CalibrationOptions(**OPTIONS))
    x, weights, spec = ffn_inputs(small, rows)[2], small.weights.layers[2].ffn, SMALL.ffn_spec()
    dense = oracle.ffn(x, weights, None, spec)[0]

    def error(**options):
        fitted, reports = fit(small, rank=4, **options)
        return np.square(oracle.ffn(x, weights, fitted.predictors[2], spec)[0] - dense).sum(), reports[2].skipped

    (per_neuron, skipped), (per_layer, layer_skipped) = error(), error(bias="layer")
    assert skipped == pytest.approx(layer_skipped, abs=0.02)
    assert per_neuron < 0.9 * per_layer


def test_whitening_helps_where_the_data_is_skewed():
    """Inputs with outlier channels and a mean, as real hidden states have."""
    config = dataclasses.replace(SMALL, num_layers=1)
    params = random_params(config)
    scale = params.weights.layers[0].post_attention_norm * jnp.where(jnp.arange(32) % 8 == 0, 6.0, 0.5)
    weights = params.weights.replace_layer(0, post_attention_norm=scale)
    weights = dataclasses.replace(weights, embed=weights.embed + 0.7)
    params = dataclasses.replace(params, weights=weights)

    def recall(**options):
        return fit(params, rank=4, bits=16, **options)[1][0].recall

    assert recall() > recall(whiten=False) + 0.01


def test_rows_are_cut_behind_the_bos_token_and_drawn_by_seed():
    params = random_params(dataclasses.replace(SMALL, bos_token_id=7, num_layers=1))
    stream = np.arange(900) % 100 + 20
    options = CalibrationOptions(rank=8, tokens=400)
    rows = make_rows(params, [stream[:333], stream[333:]], options)
    assert (rows[:, 0] == 7).all()
    assert rows.shape == (8, 51)
    starts = [np.flatnonzero(stream[::50] == row[1])[0] for row in rows]
    for row in rows:
        assert (np.diff(row[1:]) % 100 == 1).all()
    assert starts
    np.testing.assert_array_equal(rows, make_rows(params, [stream], options))
    assert not np.array_equal(rows, make_rows(params, [stream], dataclasses.replace(options, seed=1)))
    without = make_rows(random_params(dataclasses.replace(SMALL, num_layers=1)), [stream], options)
    np.testing.assert_array_equal(without, rows[:, 1:])


def test_long_sequences_are_cut_to_the_context():
    params = random_params(dataclasses.replace(SMALL, context_length=40, bos_token_id=7, num_layers=1))
    assert make_rows(params, [np.arange(900) % 100], CalibrationOptions(rank=8)).shape == (23, 40)


def test_the_first_position_is_left_out():
    """Its activations, here enormous and unlike all others, do not move the predictors at all."""
    config = dataclasses.replace(SMALL, num_layers=1, bos_token_id=7)
    params = random_params(config)
    attention = params.weights.layers[0].attention
    attention = dataclasses.replace(attention, o=Linear(0 * attention.o.rows))
    silent = params.weights.replace_layer(0, attention=attention)
    stream = np.where(TOKENS[0] == 7, 8, TOKENS[0])
    results = []
    for value in (1.0, -300.0):
        weights = dataclasses.replace(silent, embed=silent.embed.at[7].set(value * jnp.arange(32)))
        fitted, reports = fit(dataclasses.replace(params, weights=weights), [stream])
        results.append((contents(fitted), reports))
    assert results[0] == results[1]


def test_chats_and_texts_are_tokenised(tmp_path):
    params = dataclasses.replace(
        random_params(dataclasses.replace(SMALL, vocab_size=257)),
        tokenizer=byte_tokenizer("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"),
    )
    words = ["def f(x): return x", "Zürich", "a b c d e f g"] * 12
    chats = [[{"role": "user", "content": word}, {"role": "assistant", "content": "ok"}] for word in words]
    lines = [{"text": words[0]}, *({"messages": chat} for chat in chats)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    texts = read_prompts(path)
    assert texts == [words[0], *chats]
    # The template ends for the assistant's turn, so the expected text is written out here.
    stream = words[0] + "".join(f"<user>{word}<assistant>ok" for word in words)
    ids = params.tokenizer.encode(stream)
    assert (
        contents(fit(params, texts)[0]) == contents(fit(params, [np.array(ids)])[0]) == contents(fit(params, stream)[0])
    )


def test_a_line_separator_inside_a_text_does_not_end_its_line(tmp_path):
    """JSON strings may hold U+2028 and U+0085 unescaped; only a newline ends a line of .jsonl."""
    path = tmp_path / "prompts.jsonl"
    texts = ["one\u2028two", "three\u0085four", "five\u2029six"]
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    assert read_prompts(path) == texts


class Crash(BaseException):
    pass


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_resumed_calibration_is_identical(bits, small, tmp_path):
    """The caller raises after each layer in turn; finished layers are read back, with their reports."""
    expected, expected_reports = fit(small, bits=bits)
    for crash_at in range(SMALL.num_layers):

        def crash(report, crash_at=crash_at):
            if report.layer == crash_at:
                raise Crash

        with pytest.raises(Crash):
            jsparse.fit_predictors(small, TOKENS, on_layer=crash, state_dir=tmp_path, **(OPTIONS | {"bits": bits}))
    resumed, reports = fit(small, bits=bits, state_dir=tmp_path)
    assert contents(resumed) == contents(expected)
    assert reports == expected_reports
    assert jax.tree.structure(resumed.predictors) == jax.tree.structure(expected.predictors)


def test_finished_layers_are_not_fitted_again(small, tmp_path, monkeypatch):
    fit(small, state_dir=tmp_path)
    monkeypatch.setattr("jsparse.predictors.fit.fit_layer", None)
    monkeypatch.setattr("jsparse.predictors.fit._run_block", None)
    fit(small, state_dir=tmp_path)


@pytest.mark.parametrize("during", ["_replace", "os.replace", "Path.unlink"])
def test_a_crash_between_any_two_writes_changes_nothing(during, small, uninterrupted, tmp_path, monkeypatch):
    """One run after another in the same directory, each dying one write later, then one that lives.

    `_replace` dies before a file is begun, `os.replace` when it is written but not in place.
    """
    name = f"jsparse.predictors.state.{during}"
    originals = {"_replace": calibration_state._replace, "os.replace": os.replace, "Path.unlink": Path.unlink}
    original = originals[during]
    crashes = 0
    for survives in range(20):
        calls = 0

        def dying(*arguments, survives=survives, **options):
            nonlocal calls
            if calls == survives:
                raise Crash
            calls += 1
            return original(*arguments, **options)

        fresh = tmp_path / str(survives)
        with monkeypatch.context() as patch:
            patch.setattr(name, dying)
            try:
                fit(small, state_dir=fresh)
                break
            except Crash:
                crashes += 1
        assert contents(fit(small, state_dir=fresh)[0]) == uninterrupted
    assert crashes == {"_replace": 7, "os.replace": 7, "Path.unlink": 3}[during]


@pytest.mark.parametrize(
    "change",
    [{"sparsity": 0.7}, {"rank": 9}, {"bits": 8}, {"seed": 1}, {"center": False}, {"texts": None}, {"params": None}],
)
def test_the_state_of_another_calibration_is_refused(change, small, tmp_path):
    state = tmp_path / "state"
    with pytest.raises(Crash):
        jsparse.fit_predictors(small, TOKENS, on_layer=lambda report: raise_crash(), state_dir=state, **OPTIONS)
    before = {path.name: path.read_bytes() for path in state.iterdir()}
    params = random_params(SMALL, seed=1) if "params" in change else small
    texts = [TOKENS[0][::-1]] if "texts" in change else TOKENS
    options = OPTIONS | {k: v for k, v in change.items() if v is not None}
    with pytest.raises(jsparse.JsparseError, match=f"{state} holds an unfinished calibration of another"):
        jsparse.fit_predictors(params, texts, state_dir=state, **options)
    assert {path.name: path.read_bytes() for path in state.iterdir()} == before


@pytest.mark.parametrize("same", [{"rank": None}, {"rank": (8, 8, 8)}, {"rank": np.int64(8)}], ids=str)
def test_the_same_options_in_other_words_continue(same, small, uninterrupted, tmp_path):
    with pytest.raises(Crash):
        jsparse.fit_predictors(small, TOKENS, on_layer=lambda report: raise_crash(), state_dir=tmp_path, **OPTIONS)
    assert contents(jsparse.fit_predictors(small, TOKENS, state_dir=tmp_path, **(OPTIONS | same))) == uninterrupted


def raise_crash():
    raise Crash


def test_layers_are_fitted_as_they_are_asked_for(small):
    """One layer at a time: the second is not begun before it is wanted."""
    rows = make_rows(small, TOKENS, CalibrationOptions(**OPTIONS))
    layers = fit_layers(small, rows, CalibrationOptions(**OPTIONS))
    assert next(layers)[1].layer == 0
    layers.close()


DEEP = dataclasses.replace(SMALL, num_layers=10, vocab_size=257)


def command(*arguments: object, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "jsparse.calibrate", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_the_command_survives_being_killed(tmp_path):
    """Killed twice by SIGKILL while fitting, then finished: the predictors of an uninterrupted call, and a plot."""
    params = dataclasses.replace(random_params(DEEP), tokenizer=byte_tokenizer())
    jsparse.save(params, tmp_path / "model")
    text = "".join(chr(32 + i) for i in np.random.default_rng(0).integers(0, 95, 2000))
    (tmp_path / "prompts.txt").write_text(text)
    out, state = tmp_path / "out", tmp_path / "out.unfinished"
    run = partial(
        command,
        tmp_path / "model",
        *("--prompts", tmp_path / "prompts.txt", "--output", out, "--rank", 8, "--bits", 4, "--sparsity", 0.8),
        *("--plot", tmp_path / "plot.png"),
    )
    for layer in (0, 4):
        process = run()
        while process.poll() is None and not (state / f"layer_{layer}.npz").exists():
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it finished before it could be killed"
        assert state.is_dir()
        assert not out.exists()
    process = run()
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "continuing the calibration" in printed
    assert not state.exists()
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "plot.png", "prompts.txt"]
    loaded = jsparse.load(out)
    expected = jsparse.fit_predictors(params, text, rank=8, bits=4, sparsity=0.8)
    assert contents(loaded) == contents(expected)
    assert isinstance(jsparse.generate(loaded, "def", max_new_tokens=4), str)


def test_the_command_fits_and_prints_every_layer(tmp_path, capsys):
    params = dataclasses.replace(random_params(dataclasses.replace(SMALL, vocab_size=257)), tokenizer=byte_tokenizer())
    jsparse.save(params, tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"text": "%s"}\n' % ("abc def ghi " * 60))
    arguments = ["--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "out", "--rank", "4,6,8", "--bits", 8]
    arguments += ["--sparsity", 0.6, "--tokens", 500, "--seed", 3, "--no-whiten", "--no-center"]
    arguments += ["--bias", "layer", "--importance", "gate"]
    calibrate.main([str(argument) for argument in (tmp_path / "model", *arguments)])
    printed = capsys.readouterr().out
    expected, reports = fit(
        params, "abc def ghi " * 60, rank=(4, 6, 8), bits=8, sparsity=0.6, tokens=500, seed=3,
        whiten=False, center=False, bias="layer", importance="gate",
    )  # fmt: skip
    assert contents(jsparse.load(tmp_path / "out")) == contents(expected)
    for report in reports:
        assert f"{report.recall:.2%}" in printed
        assert f"{report.sparsity:.1%}" in printed
