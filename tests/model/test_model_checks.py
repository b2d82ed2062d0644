"""Models that do not fit together are refused where they enter."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_params, run_decoder

import jsparse
from convert import to_huggingface
from jsparse.arrays import Rows, dequantize
from jsparse.checkpoints.native import save
from jsparse.executors.kernels import KernelExecutor
from jsparse.executors.xla import Xla
from jsparse.predictors.svd import fit_low_bit, fit_svd


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_kv_heads": 3}, "not a multiple"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": 2**31}, "sliding_window is 2147483648, more than positions of 32 bits can count"),
        ({"num_layers": 10_001}, "num_layers is 10001, more than 10000"),
        ({"num_layers": True}, "num_layers is True and must be a whole number"),
        ({"embed_scale": "x"}, "embed_scale is 'x' and must be a finite number"),
        ({"rope_theta": float("nan")}, "rope_theta is nan and must be a finite number"),
        ({"eos_token_ids": ("a",)}, r"eos_token_ids is \('a',\) and must be a list of token ids"),
        ({"rope_scaling": jsparse.model.config.RopeScaling("linear", 0.0)}, "scaling factor is 0.0"),
        ({"ffn_kind": "gelu"}, "ffn_kind is 'gelu'"),
        ({"ffn_threshold": 0.1}, "ffn_threshold is 0.1, but reglu has none"),
        ({"head_dim": 7}, "head_dim is 7"),
    ],
)
def test_configs(fields, message):
    with pytest.raises(jsparse.JsparseError, match=message):
        dataclasses.replace(TINY, **fields)


def test_config_round_trips_through_json():
    config = dataclasses.replace(
        TINY, eos_token_ids=[1, 2], rope_scaling=jsparse.model.config.RopeScaling("llama3", 8.0), sliding_window=64
    )
    assert jsparse.ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(jsparse.JsparseError, match="unknown field 'x'; missing field 'hidden_size'"):
        jsparse.ModelConfig.from_dict({**{k: v for k, v in config.to_dict().items() if k != "hidden_size"}, "x": 1})


@pytest.mark.parametrize("fields", [{"vocab_size": 256}, {"num_layers": 2}, {"num_layers": 4}, {"num_kv_heads": 4}])
def test_weights_of_another_config_are_refused(fields, tmp_path):
    params = random_params(TINY)
    other = dataclasses.replace(params, config=dataclasses.replace(TINY, **fields))
    with pytest.raises(jsparse.JsparseError, match="the weights do not fit the config"):
        save(other, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": jnp.ones((4, 64), jnp.int32)}, "layer 1 a is of int32, expected one of float32, bfloat16, float16"),
        ({"bias": np.zeros(256, np.float64)}, "layer 1 bias is of float64"),
        ({"b": [1.0]}, "layer 1 b is of type list, expected an array"),
    ],
)
def test_predictors_of_another_type_are_refused(changes, message, tiny_fitted, tmp_path):
    first, second, third = tiny_fitted.predictors
    broken = dataclasses.replace(tiny_fitted, predictors=(first, dataclasses.replace(second, **changes), third))
    with pytest.raises(jsparse.JsparseError, match=message):
        jsparse.generate(broken, np.array([1, 2, 3]))
    with pytest.raises(jsparse.JsparseError, match=message):
        save(broken, tmp_path / "model")
    with pytest.raises(jsparse.JsparseError, match=r"must be a tuple of jsparse\.Predictor"):
        save(dataclasses.replace(tiny_fitted, predictors=(1, 2, 3)), tmp_path / "model")


def test_numbers_of_numpy_in_a_config_are_saved(tiny, tmp_path):
    config = dataclasses.replace(TINY, num_heads=np.int64(4), logit_scale=np.float32(0.5))
    save(dataclasses.replace(tiny, config=config), tmp_path / "model")
    assert jsparse.load(tmp_path / "model").config == dataclasses.replace(TINY, logit_scale=0.5)


def test_predictors_on_a_dense_model_are_refused(tiny_fitted):
    config = dataclasses.replace(TINY, ffn_kind="swiglu")
    with pytest.raises(jsparse.JsparseError, match="swiglu FFN has no zero neurons"):
        jsparse.generate(dataclasses.replace(tiny_fitted, config=config), np.array([1, 2, 3]))


def test_a_model_saved_on_another_device_loads(tiny, tmp_path):
    """Orbax notes the device of every array; only the notes of one that is not here are simulated."""
    save(tiny, tmp_path / "model")
    notes = tmp_path / "model" / "weights" / "_sharding"
    before = notes.read_text()
    notes.write_text(before.replace("TFRT_CPU_0", "cuda:0").replace("cpu:0", "cuda:0"))
    assert notes.read_text() != before
    loaded = jsparse.load(tmp_path / "model")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded.weights, tiny.weights))


def test_predictors_of_no_finite_data_are_refused():
    with pytest.raises(jsparse.JsparseError, match="gram has NaN"):
        fit_svd(jnp.ones((8, 4)), jnp.full((4, 4), jnp.nan), 2)


def test_a_rank_beyond_the_data_stays_a_least_squares_fit():
    """More features than the data have dimensions: the spare ones must not disturb the fit."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 6)) @ rng.standard_normal((6, 32))
    gate = rng.standard_normal((64, 32))
    value = x @ gate.T
    target = np.maximum(value, np.minimum(value.mean(axis=0), 0) - 0.5 * value.std(axis=0))
    fits = [fit_low_bit(gate, x, rank, bits=8) for rank in (6, 24)]
    exact, spare = (
        np.linalg.norm(x @ np.asarray(dequantize(a)).T @ np.asarray(dequantize(b)).T + offset - target)
        for a, b, offset in fits
    )
    assert spare < 1.02 * exact < 0.7 * np.linalg.norm(target - target.mean(axis=0))


@pytest.mark.parametrize("temperature", [1e-46, 1e-38, 1e-20])
def test_tiny_temperatures_are_greedy(tiny, temperature):
    prompt = np.arange(10)
    greedy = jsparse.generate(tiny, prompt, max_new_tokens=12)
    np.testing.assert_array_equal(jsparse.generate(tiny, prompt, max_new_tokens=12, temperature=temperature), greedy)


def with_config(params: jsparse.Params, **changes) -> jsparse.Params:
    return dataclasses.replace(params, config=dataclasses.replace(params.config, **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: dataclasses.replace(p, weights={}), "the weights are of type dict; they must be jsparse.Weights"),
        (
            lambda p: dataclasses.replace(
                p, config=dataclasses.replace(p.config, ffn_kind="fatrelu", ffn_threshold=0.1)
            ),
            "the thresholds of the FFNs are not the configuration's ffn_threshold 0.1",
        ),
        (
            lambda p: dataclasses.replace(p, config=dataclasses.replace(p.config, num_layers=2)),
            "layers/2/attention/k/rows is unknown",
        ),
        (lambda p: dataclasses.replace(p, weights=dataclasses.replace(p.weights, head=None)), "head is missing"),
        *(
            (
                lambda p, dtype=dtype: dataclasses.replace(
                    p, weights=dataclasses.replace(p.weights, head=p.weights.head.astype(dtype))
                ),
                f"head is of {dtype}, expected one of float32, bfloat16, float16",
            )
            for dtype in ("int32", "bool", "float8_e4m3fn")
        ),
    ],
)
@pytest.mark.parametrize("use", ["generate", "fit", "save", "export"])
def test_weights_of_another_configuration_are_refused(change, message, use, tiny, tiny_tokens, tmp_path):
    uses = {
        "generate": lambda p: jsparse.generate(p, np.arange(5), max_new_tokens=4),
        "fit": lambda p: jsparse.fit_predictors(p, tiny_tokens, rank=4),
        "save": lambda p: jsparse.save(p, tmp_path / "model"),
        "export": lambda p: to_huggingface(p, tmp_path / "model"),
    }
    with pytest.raises(jsparse.JsparseError, match=message):
        uses[use](change(tiny))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64' and must be a whole number"),
        ({"num_layers": None}, "num_layers is None and must be a whole number"),
        ({"head_dim": 6.0}, "head_dim is 6.0 and must be a whole number"),
        ({"sliding_window": 2.5}, "sliding_window is 2.5 and must be a whole number"),
        ({"eos_token_ids": 2}, "eos_token_ids is 2 and must be a list of token ids"),
        ({"eos_token_ids": "2"}, "eos_token_ids is '2' and must be a list of token ids"),
        ({"slides": True}, "slides is True and must be a list"),
        ({"rope_scaling": {"kind": "linear"}}, "rope_scaling is {'kind': 'linear'} and must be a RopeScaling"),
        (
            {"rope_scaling": jsparse.model.config.RopeScaling("bogus", 2.0)},
            "rope_scaling is of kind 'bogus' and must be one of linear",
        ),
    ],
)
def test_values_of_another_type_are_refused(changes, said):
    with pytest.raises(jsparse.JsparseError) as caught:
        dataclasses.replace(TINY, **changes)
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", [["reglu"], {}, None, 3])
def test_an_ffn_kind_of_another_type_is_refused(kind):
    with pytest.raises(jsparse.JsparseError, match=r"ffn_kind is .* and must be one of reglu, drelu"):
        dataclasses.replace(TINY, ffn_kind=kind)


@pytest.mark.parametrize("executor", [Xla, KernelExecutor, 3, None])
def test_what_is_no_executor_is_refused(executor, tiny):
    with pytest.raises(jsparse.JsparseError, match="it must be auto, the name of one, or an executor"):
        jsparse.generate(tiny, np.arange(5), max_new_tokens=4, executor=executor)


def test_a_quantised_embedding_runs(tiny):
    from jsparse.arrays import Storage
    from jsparse.rounding import quantize_rows

    weights = dataclasses.replace(tiny.weights, embed=quantize_rows(tiny.weights.embed, Storage("int8")))
    assert isinstance(weights.embed, Rows)
    assert len(jsparse.generate(dataclasses.replace(tiny, weights=weights), np.arange(5), max_new_tokens=4)) == 4


def test_a_directory_in_the_way_of_the_state_is_left_alone(tiny, tiny_tokens, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(jsparse.JsparseError, match="is in the way"):
        jsparse.fit_predictors(tiny, tiny_tokens, rank=8, state_dir=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_damaged_state_is_named(tiny, tiny_tokens, tmp_path):
    jsparse.fit_predictors(tiny, tiny_tokens, rank=np.int64(8), state_dir=tmp_path)
    (tmp_path / "layer_0.npz").write_bytes(b"")
    with pytest.raises(jsparse.JsparseError, match=r"layer_0.npz is damaged"):
        jsparse.fit_predictors(tiny, tiny_tokens, rank=np.int64(8), state_dir=tmp_path)


def test_importing_jsparse_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import jsparse, convert; print(jsparse.load('default').config.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


UNIMPLEMENTED = {
    "layer norms": {"norm": "layer"},
    "norms of queries and keys": {"qk_norm": True},
    "rotation of some dimensions only": {"rotary_dim": 8},
    "yarn rope scaling": {"rope_scaling": jsparse.model.config.RopeScaling("yarn", 4.0)},
    "biases in the FFN": {"ffn_bias": True},
    "experts": {"experts": jsparse.model.config.Experts(8, 2, "softmax")},
}


@pytest.mark.parametrize("what", UNIMPLEMENTED)
def test_what_a_config_says_and_no_executor_computes_is_refused(what, tiny, tmp_path):
    config = dataclasses.replace(TINY, **UNIMPLEMENTED[what])
    params = dataclasses.replace(tiny, config=config)
    with pytest.raises(jsparse.JsparseError, match=f"cannot run this model: not implemented: {what}"):
        jsparse.generate(params, [1, 2, 3])
    with pytest.raises(jsparse.JsparseError, match=f"not implemented: {what}"):
        jsparse.fit_predictors(params, [np.arange(3000) % 100])
    with pytest.raises(jsparse.JsparseError, match=f"not implemented: {what}"):
        to_huggingface(params, tmp_path / "out")
    assert jsparse.ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slides": (False,)}, "slides has 1 layers, the model 3"),
        ({"rotates": (False,) * 4}, "rotates has 4 layers, the model 3"),
        ({"rotary_dim": 17}, "rotary_dim is 17 and must be even and at most head_dim 16"),
        ({"rotary_dim": 18}, "rotary_dim is 18"),
        ({"norm": "batch"}, "norm is 'batch' and must be one of rms, layer"),
        ({"attention_bias": True}, "attention_bias is True and must be one of none, qkv, all"),
        ({"experts": jsparse.model.config.Experts(2, 3, "softmax")}, "a token takes 3 of 2 experts"),
    ],
)
def test_configs_that_contradict_themselves(changes, said):
    with pytest.raises(jsparse.JsparseError, match=said):
        dataclasses.replace(TINY, **changes)


def test_layers_may_have_no_rotation(tiny):
    """Without it, tokens before the last may change places."""
    config = dataclasses.replace(TINY, rotates=(False,), num_layers=1)
    weights = dataclasses.replace(tiny.weights, layers=tiny.weights.layers[:1])
    ids = np.array([[5, 9, 33, 7], [33, 5, 9, 7]])
    logits, _ = run_decoder(dataclasses.replace(tiny, config=config, weights=weights), ids)
    np.testing.assert_allclose(logits[0, -1], logits[1, -1], rtol=0, atol=1e-4)
    rotating = dataclasses.replace(config, rotates=None)
    logits, _ = run_decoder(dataclasses.replace(tiny, config=rotating, weights=weights), ids)
    assert np.abs(logits[0, -1] - logits[1, -1]).max() > 1e-2


def test_a_config_of_old_features_is_written_as_version_0_1_wrote_it():
    fields = list(dataclasses.replace(TINY, attention_bias="qkv").to_dict())
    assert fields[12:16] == ["norm_eps", "sliding_window", "qkv_bias", "tie_embeddings"]
    assert len(fields) == 22
