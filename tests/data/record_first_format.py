"""Writes first_format.tar.gz: models and an unfinished calibration as version 0.1.0 left them.

Run with jsparse 0.1.0 installed (`git checkout ec843c2`): python tests/data/record_first_format.py first_format.tar.gz
"""

import contextlib
import dataclasses
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jsparse.decoder import Decoder
from jsparse.ffn import reference
from jsparse.quantization import quantize_rows

import jsparse

CONFIG = jsparse.ModelConfig(16, 32, 2, 2, 1, 24, context_length=64, qkv_bias=True, name="first")
TEXT = [np.random.default_rng(0).integers(0, 24, 600)]
OPTIONS = {"rank": 4, "sparsity": 0.7, "tokens": 500}


class Stop(Exception):
    """Raised after the first layer."""


def stop(report):
    raise Stop


def weights_of():
    def feed_forward(layer, x, ffn):
        return reference.dense_ffn(x, ffn, CONFIG.ffn_spec()), None

    tokens = jnp.zeros((1, 4), jnp.int32)
    weights = Decoder(CONFIG, reference).init(jax.random.key(3), tokens, jnp.arange(4)[None], feed_forward)["params"]
    weights = {**weights, "embed": 50 * weights["embed"], "lm_head": 20 * weights["lm_head"]}
    for i in range(2):
        layer = weights[f"layers_{i}"]
        attention = dict(layer["attention"])
        attention["q_bias"] = attention["q_bias"] + 0.25 * (i + 1)
        attention["v_bias"] = attention["v_bias"] - 0.5
        scale = layer["input_norm"]["scale"] * 1.5
        weights[f"layers_{i}"] = {**layer, "attention": attention, "input_norm": {"scale": scale}}
    return weights


def main(out: Path) -> None:
    weights = weights_of()
    params = jsparse.Params(CONFIG, weights)
    fitted = jsparse.fit_predictors(params, TEXT, **OPTIONS)
    jsparse.save(fitted, out / "model")
    ffn = weights["layers_1"]["ffn"]
    rounded = {**weights["layers_1"], "ffn": dataclasses.replace(ffn, gate=quantize_rows(ffn.gate, 8))}
    low = {**weights, "layers_1": rounded, "lm_head": weights["lm_head"].astype(jnp.bfloat16)}
    jsparse.save(dataclasses.replace(fitted, weights=low), out / "low_bit")
    with contextlib.suppress(Stop):
        jsparse.fit_predictors(params, TEXT, on_layer=stop, state_dir=out / "unfinished", **OPTIONS)
    tokens = {
        name: {
            "sparse" if sparse else "dense": jsparse.generate(
                jsparse.load(out / name), [1, 2, 3], max_new_tokens=20, executor="xla", sparse=sparse
            ).tolist()
            for sparse in (False, True)
        }
        for name in ("model", "low_bit")
    }
    (out / "tokens.json").write_text(json.dumps(tokens) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, tarfile.open(sys.argv[1], "w:gz") as archive:
        main(Path(folder))
        archive.add(folder, ".")
