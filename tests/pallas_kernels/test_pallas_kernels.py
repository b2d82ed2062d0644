"""The Pallas kernels for CUDA: lowered anywhere, compiled where the CUDA wheels are, and what they refuse."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse
import pallas_kernels
from jsparse.executors.kernels import KernelExecutor, operand, with_float_codebooks
from jsparse.rounding import quantize_groups
from pallas_kernels import tune
from pallas_kernels.tiles import DEFAULTS, Tiles, choose

CUDA = KernelExecutor("cuda")
REPOSITORY = Path(__file__).parents[2]


def random_operands(*, batch=2, width=48, neurons=200, rank=16, seed=0) -> list[jax.Array]:
    """x, gate, up, down_t, threshold, a, b and bias, of which about half of the neurons are predicted."""
    keys = jax.random.split(jax.random.key(seed), 7)
    shapes = [(batch, width), *[(neurons, width)] * 3, (rank, width), (neurons, rank), (neurons,)]
    operands = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]
    return [*operands[:4], jnp.zeros(neurons), *operands[4:]]


@pytest.mark.parametrize(
    "tiles",
    [
        Tiles(),
        Tiles(neurons=16, rows=1, columns=16, groups=1, slots=1, down_columns=16),
        Tiles(neurons=64, rows=8, columns=32, groups=8, slots=2, down_columns=32),
        Tiles(neurons=256, rows=16, groups=2, slots=32),
    ],
)
def test_the_result_does_not_depend_on_the_tiles(tiles):
    operands = random_operands()
    expected = pallas_kernels.sparse_ffn(*operands, tiles=Tiles(neurons=32))
    y, counts = jax.jit(partial(pallas_kernels.sparse_ffn, tiles=tiles))(*operands)
    np.testing.assert_allclose(y, expected[0], rtol=0, atol=1e-5 * np.abs(expected[0]).max())
    np.testing.assert_array_equal(counts, expected[1])


def test_wrong_operands_are_named():
    x, gate, up, down_t, threshold, *predictor = random_operands()
    a, b, bias = predictor
    sparse_ffn = pallas_kernels.sparse_ffn
    with pytest.raises(ValueError, match="activation is 'silu', which has no zeros to skip"):
        sparse_ffn(x, gate, up, down_t, threshold, *predictor, activation="silu")
    with pytest.raises(ValueError, match=r"up has shape \(199, 48\), which is not that of \(200, 48\); b has shape"):
        sparse_ffn(x, gate, up[1:], down_t, threshold, a, b.T, bias)
    with pytest.raises(ValueError, match="gate is int8 without scales"):
        sparse_ffn(x, gate.astype(jnp.int8), up, down_t, threshold, *predictor)
    with pytest.raises(ValueError, match=r"gate is int8 with scales \(10,\); int8 or uint8 with \(200, 1\)"):
        sparse_ffn(x, (gate.astype(jnp.int8), jnp.ones(10)), up, down_t, threshold, *predictor)
    with pytest.raises(ValueError, match=r"x and bias have shapes \(48,\) and \(200,\)"):
        sparse_ffn(x[0], gate, up, down_t, threshold, *predictor)
    with pytest.raises(ValueError, match=r"threshold has shape \(9,\), bias \(200,\)"):
        sparse_ffn(x, gate, up, down_t, threshold[:9], *predictor)
    with pytest.raises(ValueError, match="activation is 'gelu'; it must be one of relu, relu2, silu"):
        pallas_kernels.dense_ffn(x, gate, up, down_t, threshold, activation="gelu")
    with pytest.raises(ValueError, match="up_activation is 'silu'; it must be one of linear, relu"):
        pallas_kernels.dense_ffn(x, gate, up, down_t, threshold, up_activation="silu")
    packed = (jnp.zeros((200, 24), jnp.uint8), jnp.ones((200, 1)))
    with pytest.raises(ValueError, match="up has 4 bits"):
        sparse_ffn(x, gate, packed, down_t, threshold, *predictor)


def test_an_executor_that_looks_weights_up_in_float32_computes_the_same():
    """`place` widens the codebook of int4 weights; that changes no bit."""
    codebook = jnp.asarray([-127, -96, -70, -50, -33, -20, -9, 0, 8, 19, 31, 45, 62, 81, 103, 127], jnp.int8)
    x, gate, up, down_t, threshold, *predictor = random_operands(batch=3, width=97)
    rows = [quantize_groups(m, codebook) for m in (gate, up, down_t)]
    placed = with_float_codebooks(rows)
    assert [m.codebook.dtype for m in placed] == ["float32"] * 3
    results = []
    for stored in (rows, placed):
        weights = [operand(m) for m in stored]
        dense = pallas_kernels.dense_ffn(x, *weights, threshold)
        sparse, _ = pallas_kernels.sparse_ffn(x, *weights, threshold, *predictor)
        results.append((dense, sparse, *pallas_kernels.linear(x, *weights[:2])))
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert np.abs(results[0][0]).max() > 0


def test_tiles_of_a_gpu_older_or_newer_than_those_known():
    assert choose(1, 1, "bfloat16", "sm_75") == choose(1, 1, "bfloat16", "sm_80") == DEFAULTS["sm_80"]
    assert choose(1, 1, "bfloat16", "sm_87") == DEFAULTS["sm_86"]
    assert choose(1, 1, "bfloat16", "sm_120") == DEFAULTS["sm_90"]
    assert choose(1, 1, "uint8", "sm_89").rows == choose(1, 1, "uint8", "sm_90").rows == 2


def test_tiles_that_a_kernel_cannot_have():
    with pytest.raises(ValueError, match="neurons is 24, slots is 0"):
        Tiles(neurons=24, slots=0)
    with pytest.raises(ValueError, match="rows is 16, more than the 8 neurons"):
        Tiles(neurons=8, rows=16)


def test_a_machine_without_a_gpu_says_what_to_do():
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("there is a GPU")
    assert pallas_kernels.unavailable() == "JAX finds no CUDA device: JAX_PLATFORMS is cpu, which leaves them out"
    script = "import pallas_kernels; print(pallas_kernels.unavailable())"
    assert "pip install 'jax[cuda13]' and check that nvidia-smi lists a GPU" in run(["-c", script], JAX_PLATFORMS="")


@pytest.mark.parametrize(
    "name", ["llama_ours", "llama_int8", "llama_int4", "odd_int4", "qwen2_batch", "minicpm_float32", "odd"]
)
def test_kernels_lower_for_cuda_with_no_cuda_wheels(name):
    """The text holds a Triton module per kernel: nothing was interpreted, and no dense product stands in."""
    script = (
        "import cuda_aot, sys, jax, jax.numpy as jnp\n"
        "from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh\n"
        f"case = cuda_aot.CASES[{name!r}]\n"
        "struct = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))\n"
        "device = AbstractDevice('NVIDIA H100', None, 'cuda')\n"
        "with use_abstract_mesh(AbstractMesh((1,), ('x',), abstract_device=device)):\n"
        "    traced = jax.jit(cuda_aot.ffn(case)).trace(*cuda_aot.operands(case, struct))\n"
        "    print(traced.lower(lowering_platforms=('cuda',)).as_text())\n"
    )
    text = run(["-c", script, "unused"])
    assert text.count("__gpu$xla.gpu.triton") + text.count("triton_kernel_call") == 2
    assert 'name = "predict_gate_up"' in text or "predict_gate_up" in text
    assert "down" in text


@pytest.fixture(scope="module")
def fitted():
    params = jsparse.load("default")
    return jsparse.fit_predictors(params, [np.arange(4000) % params.config.vocab_size], rank=16)


PROMPT = "def read(self, size):\n"


@pytest.mark.nightly
@pytest.mark.parametrize("sparse", [False, True])
def test_generation_with_interpreted_kernels(fitted, sparse, monkeypatch):
    """The whole decode loop on the CUDA executor gives the tokens that XLA's gives."""
    if pallas_kernels.unavailable() is None:
        pytest.skip("the kernels are compiled here")
    options = {"max_new_tokens": 12, "sparse": sparse}
    texts = [jsparse.generate(fitted, PROMPT, executor=executor, **options) for executor in (CUDA, "xla")]
    assert texts[0] == texts[1]
    prompts = [PROMPT, ">>> 37 + 58\n"]
    batches = [jsparse.generate(fitted, prompts, executor=executor, **options) for executor in (CUDA, "xla")]
    assert batches[0] == batches[1]


@pytest.fixture(scope="module")
def gpu():
    if reason := pallas_kernels.unavailable():
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [["--dense"], []], ids=["dense", "sparse"])
def test_generation_on_a_gpu_gives_the_tokens_of_the_cpu(gpu, fitted, options, tmp_path):
    jsparse.save(fitted, tmp_path / "fitted")
    texts = {}
    for platform, executor in (("cuda", "cuda"), ("cpu", "cpu")):
        command = ["-m", "jsparse", "generate", str(tmp_path / "fitted"), PROMPT, "--max-new-tokens", "64", *options]
        texts[executor] = run([*command, "--executor", executor], JAX_PLATFORMS=platform)
    assert texts["cuda"] == texts["cpu"]
    assert len(texts["cpu"]) > 60


WHEELS = {
    "jax_cuda13_plugin": "jax-cuda13-plugin",
    "jax_plugins.xla_cuda13": "jax-cuda13-pjrt",
    "nvidia.cu13": "nvidia-cuda-nvcc and nvidia-nvvm",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    """What `cuda_aot` prints."""
    missing = [wheel for module, wheel in WHEELS.items() if not is_installed(module)]
    if missing:
        pytest.skip(f"compiling for CUDA needs {', '.join(missing)}: make test-cuda-aot")
    return json.loads(run(["-m", "cuda_aot", str(tmp_path_factory.mktemp("dump"))]))


def test_kernels_compile_for_cuda_and_spill_nothing(compiled):
    kernels = compiled["kernels"]
    assert {name.rpartition("-")[2] for name in kernels} == {"sm_80", "sm_90"}
    for name, found in kernels.items():
        expected = {"predict_gate_up", "down"}
        if "attend" in name:
            expected = {"attend", "combine"}
        elif "project" in name:
            expected = {"project"}
        assert set(found) == expected, name
        for kernel, resources in found.items():
            assert resources["spilled"] == 0, (name, kernel)
            assert resources["registers"] <= 128, (name, kernel)


def test_a_decode_step_takes_few_kernels(compiled):
    """The numbers are in docs/gpu.md; JAX 0.11 puts other things together."""
    newer = jax.__version_info__ >= (0, 11)
    assert compiled["decode"] == {
        "Llama-2-7B": {"layer": 14, "rest": 16} if newer else {"layer": 13, "rest": 18},
        "Qwen2-7B": {"layer": 17, "rest": 16} if newer else {"layer": 16, "rest": 18},  # q, k and v have biases
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_attention_lowers_for_cuda_with_no_cuda_wheels(dtype):
    script = (
        "import cuda_aot, jax, jax.numpy as jnp, sys\n"
        "from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh\n"
        "struct = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))\n"
        "device = AbstractDevice('NVIDIA H100', None, 'cuda')\n"
        "with use_abstract_mesh(AbstractMesh((1,), ('x',), abstract_device=device)):\n"
        "    operands = cuda_aot.attention_operands(sys.argv[2], 4, 28, 4, 96, struct)\n"
        "    traced = jax.jit(cuda_aot.attention(500)).trace(*operands)\n"
        "    print(traced.lower(lowering_platforms=('cuda',)).as_text())\n"
    )
    text = run(["-c", script, "unused", dtype])
    assert text.count("__gpu$xla.gpu.triton") + text.count("triton_kernel_call") == 2
    assert "attend" in text
    assert "combine" in text


def test_the_hand_written_cuda_compiles(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    source = REPOSITORY / "benchmarks" / "sparse_ffn.cu"
    command = [nvcc, "-arch=sm_80", "--std=c++17", "-cubin", "-o", str(tmp_path / "out"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def run(command: list[str], **variables: str) -> str:
    environment = {
        **os.environ,
        **variables,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
    }
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_tuner_finds_the_fastest_tiles(monkeypatch):
    """On interpreted kernels, with the times given: that it tries the sizes and keeps the best of both kernels."""
    x, layer = jnp.ones((1, 32)), tune.random_layer(jax.random.key(0), 64, 32, 8, "int8")
    monkeypatch.setattr(tune, "REPEATS", 2)
    assert tune.measure(tune.compile_program(Tiles(), x, [layer]), x, [layer], rounds=1) > 0
    _, counts = pallas_kernels.sparse_ffn(x, *layer)
    assert 0 < counts[0, 0] == counts[0, 1] < 64
    wanted = Tiles(neurons=64, rows=2, gate_warps=4, groups=8, slots=2, down_columns=256, down_warps=8)

    def distance(tiles, *_):
        return float(sum(abs(a - b) for a, b in zip(vars(tiles).values(), vars(wanted).values())))

    monkeypatch.setattr(tune, "compile_program", lambda tiles, *_: tiles)
    monkeypatch.setattr(tune, "measure", distance)
    assert tune.tune(jnp.ones((1, 4096)), [], Tiles(), 1) == (wanted, 0)


@pytest.mark.parametrize("shape", ["11008", "a,b,c", "1,2,-3"])
def test_the_tuner_refuses_a_broken_shape(shape, capsys):
    with pytest.raises(SystemExit) as stopped:
        tune.main(["--shape", shape])
    assert stopped.value.code == 2
    assert f"--shape {shape}" in capsys.readouterr().err


def test_the_tuner_needs_a_gpu(capsys):
    if pallas_kernels.unavailable() is None:
        pytest.skip("there is a GPU")
    assert tune.main(["--shape", "64,32,8"]) == 2
    assert "measured on a GPU: JAX finds no CUDA device" in capsys.readouterr().err
