"""The caller's JAX settings neither break the package nor change what it computes."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY, random_params

import jsparse

SETTINGS = {
    "jax_enable_x64": True,
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_transfer_guard": "disallow",
    "jax_default_matmul_precision": "bfloat16",
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_debug_key_reuse": True,
}
RUN = """
import json, sys
import jax
for name, value in json.loads(sys.argv[2]).items():
    jax.config.update(name, value)
import numpy as np
import jsparse
folder = sys.argv[1]
params = jsparse.load(folder)
fitted = jsparse.fit_predictors(params, [np.arange(2000) % 97], rank=8)
jsparse.save(fitted, folder + "-fitted", force=True)
fitted = jsparse.load(folder + "-fitted", dtype="bfloat16")
options = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 3}
said = [ids.tolist() for ids in jsparse.generate(fitted, [[1, 2], [3]], max_new_tokens=6, **options)]
said += [ids.tolist() for ids in jsparse.generate(fitted, [5], max_new_tokens=6, executor="xla", stream=True)]
print(json.dumps(said))
"""


def said_under(settings: dict, model: Path) -> list:
    command = [sys.executable, "-c", RUN, str(model), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.nightly  # two processes; every setting alone stays
def test_all_settings_of_the_caller_together_change_nothing(tmp_path):
    jsparse.save(random_params(TINY), tmp_path / "m")
    assert said_under(SETTINGS, tmp_path / "m") == said_under({}, tmp_path / "m")


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_alone(name):
    before = getattr(jax.config, name)
    prompt = np.arange(1, 9)
    params = random_params(TINY)
    right = jsparse.generate(params, prompt, max_new_tokens=5, temperature=0.7)
    jax.config.update(name, SETTINGS[name])
    try:
        assert getattr(jax.config, name) == SETTINGS[name]
        got = jsparse.generate(params, prompt, max_new_tokens=5, temperature=0.7)
        assert getattr(jax.config, name) == SETTINGS[name]
    finally:
        jax.config.update(name, before)
    np.testing.assert_array_equal(got, right)


def test_between_two_pieces_of_a_stream_the_caller_has_its_own_settings(default):
    with jax.enable_x64(True):
        pieces = jsparse.generate(default, "def f", max_new_tokens=9, stream=True)
        for _ in itertools.islice(pieces, 3):
            assert jax.numpy.zeros(1, float).dtype == np.float64
        assert jax.config.jax_enable_x64


def test_commands_under_an_x64_environment():
    environment = {**os.environ, "JAX_ENABLE_X64": "1", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    command = [sys.executable, "-m", "jsparse", "generate", "default", "def f", "--max-new-tokens", "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
