"""The CANN bridge without an NPU: its ops, what it hands over, generation on PyTorch's CPU and a simulated NPU."""

import dataclasses
import gc
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simulated_npu
import torch
from conftest import TINY, random_params, stored_as, with_random_predictors

import cann_bridge
import jsparse
from cann_bridge import decoder, handover
from cann_bridge.devices import weight_dtype
from cann_bridge.ops import ops
from jsparse.executors.npu import Npu
from jsparse.executors.select import make_executor, select_executor
from jsparse.model.ffn import KINDS
from jsparse.model.weights import Linear

ROOT = Path(__file__).parents[2]
PROMPT = "def read(self, size):\n"


@pytest.fixture(scope="module")
def fitted():
    params = jsparse.load("default")
    return jsparse.fit_predictors(params, [np.arange(4000) % params.config.vocab_size], rank=16)


@pytest.fixture
def npu():
    """A simulated NPU, computed on."""
    made = simulated_npu.install()
    made.chip = "910B"
    return made


def on(device: str, *, whole: bool = True) -> Npu:
    """The executor on that device of PyTorch's."""
    return Npu(make_executor("cann").host, device, whole)


def operands(*, batch=2, width=24, neurons=64, rank=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, width), *[(neurons, width)] * 3, (rank, width), (neurons, rank), (neurons,)]
    x, *matrices, a, b, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x, *(m.to(dtype) for m in matrices), torch.full((neurons,), 0.3), a, b, bias]


@pytest.mark.parametrize("up", ["linear", "relu", None])
@pytest.mark.parametrize(("parallel", "rows"), [(False, 0), (True, 0), (False, 48)])
def test_opcheck(up, parallel, rows):
    arrays = operands()
    if up is None:
        arrays[2] = None
    torch.library.opcheck(ops().sparse_ffn.default, (*arrays, "relu", up or "linear", parallel, rows))
    torch.library.opcheck(ops().dense_ffn.default, (*arrays[:5], "relu", up or "linear"))


def cpp_compiler_works() -> bool:
    """Whether Inductor, which generates C++ on a CPU, can compile it."""
    try:
        subprocess.run([os.environ.get("CXX", "g++"), "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.nightly,
                pytest.mark.skipif(not cpp_compiler_works(), reason="no C++ compiler"),
            ],
        ),
    ],
)
def test_the_ops_compile(backend):
    arguments, defined = operands(), ops()

    def step(x, *rest):
        y, counts = defined.sparse_ffn(x, *rest, "relu", "linear")
        return defined.dense_ffn(x + y, *rest[:4], "relu", "linear") * 2, counts

    expected, compiled = step(*arguments), torch.compile(step, fullgraph=True, backend=backend)(*arguments)
    for one, other in zip(expected, compiled):
        torch.testing.assert_close(one, other)


def test_a_fixed_number_of_rows_drops_the_lowest_scores():
    arguments = operands(batch=1)
    exact, counts = ops().sparse_ffn(*arguments, "relu", "linear")
    predicted = int(counts[0, 0])
    enough, _ = ops().sparse_ffn(*arguments, "relu", "linear", False, predicted)
    torch.testing.assert_close(enough, exact)
    fewer, fewer_counts = ops().sparse_ffn(*arguments, "relu", "linear", False, predicted - 5)
    assert fewer_counts[0, 0] == predicted
    x, *weights, a, b, bias = arguments
    scores = (x @ a.T @ b.T + bias)[0]
    lowest = scores.sort(descending=True).values[predicted - 5]
    kept = torch.where(scores > lowest, bias, -torch.inf)
    torch.testing.assert_close(fewer, ops().sparse_ffn(x, *weights, a, b, kept, "relu", "linear")[0])


@pytest.mark.parametrize("sparse", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_every_way_generates_the_same_tokens(fitted, sparse):
    def texts(executor):
        options = {"max_new_tokens": 48, "sparse": sparse, "executor": executor}
        return [jsparse.generate(fitted, prompt, **options) for prompt in (PROMPT, [PROMPT, ">>> 37 + 58\n"])]

    expected = texts("xla")
    assert texts(on("cpu", whole=False)) == expected  # by callback
    assert texts(on("cpu")) == expected
    npu = simulated_npu.install()
    assert texts(on("npu")) == expected
    assert "replay" in npu.log, "no step ran as a captured graph"
    if select_executor().name == "cpu":
        assert texts("cpu") == expected


@pytest.mark.parametrize("whole", [False, True])
def test_weights_of_4_bits_generate_the_same_tokens(whole):
    config = dataclasses.replace(TINY, num_layers=1, tie_embeddings=False)
    params = stored_as(random_params(config), "int4")
    expected = jsparse.generate(params, np.arange(20), max_new_tokens=20, executor="xla")
    found = jsparse.generate(params, np.arange(20), max_new_tokens=20, executor=on("cpu", whole=whole))
    np.testing.assert_array_equal(found, expected)


def test_keys_and_values_in_int8_are_the_hosts():
    """The decode loop on the device has none, and says so."""
    params, options = random_params(TINY), {"max_new_tokens": 20, "kv_dtype": "int8"}
    expected = jsparse.generate(params, np.arange(20), executor="xla", **options)
    found = jsparse.generate(params, np.arange(20), executor=on("cpu", whole=False), **options)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(jsparse.JsparseError, match="kv_dtype is int8, and the decode loop on the device keeps keys"):
        jsparse.generate(params, np.arange(20), executor=on("cpu"), **options)


def test_sampled_tokens_are_those_of_other_executors(fitted):
    options = {"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 3, "stop": "\n\n\n"}
    expected = jsparse.generate(fitted, [PROMPT, "a = "], executor="xla", **options)
    assert jsparse.generate(fitted, [PROMPT, "a = "], executor=on("cpu"), **options) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": "qkv", "ffn_kind": "drelu"},
        {"sliding_window": 40, "ffn_kind": "swiglu"},
        {"tie_embeddings": False, "context_length": 64, "ffn_kind": "fatrelu", "ffn_threshold": 0.1},
        {"embed_scale": 2.0, "residual_scale": 0.7, "logit_scale": 0.5, "eos_token_ids": (28,)},
    ],
    ids=lambda changes: " ".join(changes),
)
@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_every_part_of_a_decoder(changes, device):
    """Biases, a window that the tokens leave, the context's end, an untied head, scalings, an ending token; greedy and
    sampled, with the tokens of XLA."""
    params = random_params(dataclasses.replace(TINY, **changes))
    prompts = [np.arange(1, 34) % 128, np.arange(5)]
    simulated_npu.install()
    for options in ({}, {"temperature": 1.0, "seed": 1}):
        expected = jsparse.generate(params, prompts, max_new_tokens=40, executor="xla", **options)
        found = jsparse.generate(params, prompts, max_new_tokens=40, executor=on(device), **options)
        for one, other in zip(found, expected):
            np.testing.assert_array_equal(one, other)


def test_a_sequence_that_ends_before_the_first_step(fitted):
    expected = jsparse.generate(fitted, PROMPT, max_new_tokens=40, executor="xla")
    simulated_npu.install()
    found = jsparse.generate(fitted, PROMPT, max_new_tokens=40, executor=on("npu"), stop=expected[:1])
    assert found == ""


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.nightly), 40])
def test_a_chunk_whose_graph_read_too_few_rows_is_done_again(fitted, window, monkeypatch):
    """The tokens are those of XLA although replayed steps drop neurons, also where a window still sees old slots."""
    model = dataclasses.replace(fitted, config=dataclasses.replace(fitted.config, sliding_window=window))
    expected = jsparse.generate(model, PROMPT, max_new_tokens=100, executor="xla")
    monkeypatch.setattr(decoder, "_GRAPH_SHARE", 0.3)
    npu = simulated_npu.install()
    again = []
    suffice = decoder.Decoder._rows_suffice
    monkeypatch.setattr(decoder.Decoder, "_rows_suffice", lambda self: again.append(suffice(self)) or again[-1])
    found = jsparse.generate(model, PROMPT, max_new_tokens=100, executor=on("npu"))
    assert npu.log.count("replay") > 60
    assert again == [False] * 3
    assert found == expected


def test_a_chunk_done_again_at_the_context_s_end(monkeypatch):
    """The longest prompt meets the end in a chunk that is taken back, and steps on over slots of its beginning."""
    params = with_random_predictors(random_params(dataclasses.replace(TINY, ffn_kind="reglu", context_length=64)))
    prompts = [np.arange(1, 34) % 128, np.arange(5), np.arange(20)[::-1]]
    expected = jsparse.generate(params, prompts, max_new_tokens=110, executor="xla")
    monkeypatch.setattr(decoder, "_GRAPH_SHARE", 0.3)
    simulated_npu.install()
    found = jsparse.generate(params, prompts, max_new_tokens=110, executor=on("npu"))
    for one, other in zip(found, expected):
        np.testing.assert_array_equal(one, other)


def test_sampling_that_a_stop_string_ends(fitted, npu):
    options = {"max_new_tokens": 64, "temperature": 0.8, "seed": 3, "sparse": False, "stop": '"'}
    expected = jsparse.generate(fitted, "def f(x):\n", executor="xla", **options)
    assert jsparse.generate(fitted, "def f(x):\n", executor=on("npu"), **options) == expected


def test_rows_that_a_graph_reads_beyond_the_predicted_are_counted(fitted, npu, monkeypatch):
    monkeypatch.setattr(decoder, "_GRAPH_SHARE", 1e9)  # all of them
    found = []
    jsparse.generate(fitted, PROMPT, max_new_tokens=97, executor=on("npu"), on_finish=found.append)
    rows = fitted.config.num_layers * 3 * fitted.config.intermediate_size
    exact, captured = 32, 64
    assert captured * rows < found[0].rows < (captured + 0.5 * exact) * rows


def test_another_bias_is_another_predictor(fitted):
    predictor = fitted.predictors[0]
    silent = dataclasses.replace(predictor, bias=jnp.full_like(predictor.bias, -jnp.inf))
    executor = on("cpu", whole=False)
    ffn = executor.place_ffn(fitted.weights.layers[0].ffn)
    x = jax.random.normal(jax.random.key(0), (1, fitted.config.hidden_size))
    for given, some in ((predictor, True), (silent, False)):
        _, counts = executor.sparse_ffn(x, ffn, executor.place_predictor(given), KINDS["reglu"])
        assert (counts[0, 0] > 0) == some


def test_activations_beyond_float16(npu):
    """gate * up is 384^2, more than float16 holds, and comes out right."""
    one = jnp.ones((1, 1), jnp.float16)
    handle = cann_bridge.place_ffn(384 * one, 384 * one, one / 1024, jnp.zeros(1), cann_bridge.device())
    y = cann_bridge.dense_ffn(jnp.ones((1, 1)), handle, activation="relu", up_activation="linear")
    np.testing.assert_allclose(y, 144.0, rtol=1e-3)


def test_logits_that_are_not_finite_are_an_error(npu):
    params = random_params(TINY)
    # The prompt's own pass, on the host, is sound; the first token that the device reads is not.
    first = int(jsparse.generate(params, np.arange(1, 4), max_new_tokens=1)[0])
    assert first not in range(1, 4)
    embed = params.weights.embed.at[first].set(jnp.nan)
    broken = dataclasses.replace(params, weights=dataclasses.replace(params.weights, embed=embed))
    with pytest.raises(jsparse.JsparseError, match="executor 'cann': the logits are not finite"):
        jsparse.generate(broken, np.arange(1, 4), max_new_tokens=8, executor=on("npu"))


def test_weights_cross_once_and_every_operation_is_on_the_device(fitted, npu):
    jsparse.generate(fitted, PROMPT, max_new_tokens=20, executor=on("npu"))
    npu.log.clear()
    jsparse.generate(fitted, PROMPT, max_new_tokens=20, executor=on("npu"))
    ffn = fitted.weights.layers[0].ffn.gate.nbytes
    assert max(npu.crossed("to npu")) < ffn
    caches = 2 * fitted.config.num_layers
    assert sum(size >= 4096 for size in npu.crossed("to npu")) == caches, "something besides the KV cache crossed again"
    assert {"aten::index_select", "aten::mm.out", "aten::bmm.out"} <= npu.operations()
    assert sum(npu.crossed("to cpu")) < 2000, "more than tokens and counts came back"


def test_by_callback_only_inputs_and_outputs_cross(fitted, npu):
    prompt = [1, 2, 3]
    jsparse.generate(fitted, prompt, max_new_tokens=4, executor=on("npu", whole=False))
    npu.log.clear()
    jsparse.generate(fitted, prompt, max_new_tokens=4, executor=on("npu", whole=False))
    prefill = 32 * fitted.config.hidden_size * 4  # the prompt is padded
    assert max(npu.crossed("to npu")) == max(npu.crossed("to cpu")) == prefill


def test_the_simulated_npu_refuses(npu):
    npu.chip = "310P"
    with pytest.raises(RuntimeError, match=r"index_select does not take torch\.bfloat16 on a simulated 310P"):
        torch.ones(4, 4, dtype=torch.bfloat16).to("npu").index_select(0, torch.tensor([1]).to("npu"))
    with pytest.raises(RuntimeError, match="all tensors on one device"):
        torch.mm(torch.ones(1, 16).to("npu"), torch.ones(16, 2))


def test_a_device_without_bfloat16_and_graphs(fitted, npu, monkeypatch, caplog):
    """Weights and caches are in bfloat16, which the 310P never sees; without graphs the steps go on without them."""
    params = dataclasses.replace(fitted, weights=jax.tree.map(to_bfloat16, fitted.weights))
    npu.chip = "310P"
    text = jsparse.generate(params, PROMPT, max_new_tokens=48, executor=on("npu"))
    assert text.startswith("def read") or len(text) > 40
    assert "captures no graphs: a simulated 310P captures no graphs" in caplog.text
    npu.chip = "910B"
    assert jsparse.generate(params, PROMPT, max_new_tokens=48, executor=on("npu")) == text


@pytest.mark.parametrize("part", ["k", "v"])
def test_keys_and_values_that_the_device_cannot_hold_are_an_error(part, npu):
    """The host's bfloat16 cache holds them, the device's float16 does not, and an infinite key leaves no trace."""
    params = random_params(TINY)
    layer = params.weights.layers[1]
    attention = dataclasses.replace(layer.attention, **{part: Linear(getattr(layer.attention, part).rows * 3e3)})
    weights = params.weights.replace_layer(1, attention=attention, input_norm=layer.input_norm * 1e2)
    weights = jax.tree.map(to_bfloat16, weights)
    with pytest.raises(jsparse.JsparseError, match="executor 'cann': the logits are not finite"):
        jsparse.generate(
            dataclasses.replace(params, weights=weights), np.arange(1, 4), max_new_tokens=8, executor=on("npu")
        )


def to_bfloat16(array):
    return array.astype(jnp.bfloat16) if array.ndim == 2 else array


def test_dtypes_on_a_device():
    cpu, npu = torch.device("cpu"), types.SimpleNamespace(type="npu")
    assert [weight_dtype(d, cpu) for d in ("float32", "bfloat16", "float16", "int8")] == [
        *(torch.float32, torch.bfloat16, torch.float16, torch.float32)
    ]
    assert [weight_dtype(d, npu) for d in ("float32", "bfloat16", "float16", "int8", "uint8")] == [
        *(torch.float32, torch.float16, torch.float16, torch.float16, torch.float16)
    ]


def test_a_predictor_with_entries_beyond_float16(npu):
    """a holds inverses of what the features' spread may be; its rows are scaled and b's columns against them."""
    a = jnp.asarray([[1e6, -3e5], [1e-6, 2e-6]])
    b = jnp.asarray([[1e-6, 1e6], [-2e-6, 5e5]])
    first, second, _ = handover.resident_predictor(a, b, jnp.zeros(2), 2, cann_bridge.device())
    assert first.dtype == torch.float16
    found = second.cpu().double() @ first.cpu().double()
    np.testing.assert_allclose(found, np.asarray(b, np.float64) @ np.asarray(a, np.float64), rtol=2e-3)


def test_weights_beyond_float16_are_refused(npu):
    low_bit = jnp.full((2, 2), 127, jnp.int8), jnp.full((2, 1), 1e4)
    with pytest.raises(ValueError, match=r"a weight of shape \(1, 2\) has values that torch.float16 cannot hold"):
        handover.resident(jnp.asarray([[1e30, 1.0]], jnp.bfloat16), cann_bridge.device())
    with pytest.raises(ValueError, match=r"a weight of 2 rows has values that torch.float16 cannot hold"):
        handover.resident(low_bit, cann_bridge.device())
    with pytest.raises(ValueError, match=r"scales of shape \(2, 3\); a row has one on this device"):
        handover.resident((low_bit[0], jnp.ones((2, 3))), cann_bridge.device())


def test_what_jax_owns_is_borrowed_and_never_written():
    array = jax.random.normal(jax.random.key(0), (64, 32))
    before = np.array(array)
    tensor = handover.resident(array, torch.device("cpu"))
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    handle = cann_bridge.place_ffn(array, array, array, jnp.zeros(64), cann_bridge.device("cpu"))
    y = cann_bridge.dense_ffn(jnp.ones((1, 32)), handle, activation="relu", up_activation="linear")
    y.block_until_ready()
    np.testing.assert_array_equal(array, before)


def test_tensors_go_when_their_arrays_go():
    gc.collect()
    before = handover.counts()
    array, threshold = jax.random.normal(jax.random.key(0), (64, 32)), jnp.zeros(64)
    handle = cann_bridge.place_ffn(array, array, array, threshold, cann_bridge.device("cpu"))
    # The matrix, the threshold, and which handle stands for the one three times and the other.
    assert handover.counts() == (before[0] + 3, before[1] + 1)
    del handle, array, threshold
    gc.collect()
    assert handover.counts() == before


@pytest.mark.nightly
def test_a_thousand_steps_leave_memory_flat(fitted, npu):

    def steps(count):
        for _ in range(count // 50):
            jsparse.generate(fitted, PROMPT, max_new_tokens=51, executor=on("npu"))
        npu.log.clear()
        gc.collect()
        return handover.counts(), resident_memory()

    held, memory = steps(200)
    held_after, memory_after = steps(1000)
    assert held_after == held
    assert memory_after - memory < 30e6


@pytest.mark.nightly
def test_a_thousand_callbacks_leave_memory_flat():
    executor = on("cpu", whole=False)
    x, ffn, predictor, spec = small_layer(executor)

    @jax.jit
    def run(x, count):
        step = lambda _, x: x + 0 * executor.sparse_ffn(x, ffn, predictor, spec)[0]  # noqa: E731
        return jax.lax.fori_loop(0, count, step, x)

    run(x, 200).block_until_ready()
    held, memory = handover.counts(), resident_memory()
    run(x, 1000).block_until_ready()
    assert handover.counts() == held
    assert resident_memory() - memory < 30e6


def small_layer(executor: Npu):
    from executor_suite import problem

    x, ffn, predictor = problem(batch=1)
    return x, executor.place_ffn(ffn), executor.place_predictor(predictor), KINDS["reglu"]


def resident_memory() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("device", "whole"), [("cpu", False), ("cpu", True), pytest.param("npu", True, marks=pytest.mark.nightly)]
)
def test_two_threads_at_once(fitted, device, whole):
    simulated_npu.install()
    prompts = [PROMPT, ">>> 37 + 58 - 12\n"]
    expected = [jsparse.generate(fitted, prompt, max_new_tokens=40, executor="xla") for prompt in prompts]
    found: dict[int, list[str]] = {0: [], 1: []}

    def work(i):
        for _ in range(3):
            found[i].append(jsparse.generate(fitted, prompts[i], max_new_tokens=40, executor=on(device, whole=whole)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == {i: [expected[i]] * 3 for i in range(2)}


def test_an_exception_in_an_op_reaches_the_caller():
    executor = on("cpu", whole=False)
    x, ffn, predictor, spec = small_layer(executor)
    run = jax.jit(executor.sparse_ffn, static_argnames="spec")
    expected = run(x, ffn, predictor, spec=spec)[0]
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"have shapes .* which do not fit one another"):
        jax.block_until_ready(run(x[:, :5], ffn, predictor, spec=spec))
    with pytest.raises(ValueError, match="activation is 'silu', which has no zeros to skip"):
        ops().sparse_ffn(*operands(), "silu", "linear")
    np.testing.assert_array_equal(run(x, ffn, predictor, spec=spec)[0], expected)


def test_threads_that_use_the_bridge_first():
    script = """
import threading, jax.numpy as jnp, cann_bridge
def work(i):
    w = jnp.ones((8, 4))
    with_handle = cann_bridge.place_ffn(w, w, w, jnp.zeros(8), cann_bridge.device("cpu"))
    y = cann_bridge.dense_ffn(jnp.ones((1, 4)), with_handle, activation="relu", up_activation="linear")
    results[i] = float(y.sum())
results = {}
threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
[t.start() for t in threads]
[t.join() for t in threads]
print(sorted(results.items()))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str([(i, 8 * 4 * 16.0) for i in range(6)]), done.stderr[-2000:]


def test_without_torch_npu():
    assert cann_bridge.unavailable() == "torch_npu is not installed: pip install torch_npu==2.13.0"
    with pytest.raises(jsparse.JsparseError, match="executor 'cann' cannot run here: torch_npu is not installed"):
        jsparse.generate(jsparse.load("default"), "a", executor="cann")


def test_with_cann_but_no_device(monkeypatch):
    simulated_npu.install()
    stand_in = types.ModuleType("torch_npu")
    stand_in.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "torch_npu", stand_in)
    assert cann_bridge.unavailable() is None
    monkeypatch.setattr(torch.npu, "is_available", lambda: False)
    assert cann_bridge.unavailable() == (
        "torch_npu and CANN are installed but find no Ascend device: check that npu-smi info lists one"
    )


@pytest.fixture(scope="module")
def real_torch_npu(tmp_path_factory) -> Path:
    """A folder with torch_npu's real wheel, which no CANN is there for."""
    if Path("/usr/local/Ascend").exists():
        pytest.skip("CANN is installed here")
    folder = tmp_path_factory.mktemp("torch_npu")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    if subprocess.run([*command, "torch_npu==2.13.0"], capture_output=True).returncode:
        pytest.skip("there is no torch_npu 2.13.0 to install for this Python and platform")
    return folder


def test_the_real_torch_npu_without_cann_breaks_nothing(real_torch_npu, tmp_path):
    script = """
import sys
import jsparse, cann_bridge
print(jsparse.generate(jsparse.load("default"), ">>> 1 + 1\\n", max_new_tokens=2, executor="auto"))
print(cann_bridge.unavailable())
from convert.tensors import import_torch
print(import_torch("x.bin").ones(2).sum().item())
try:
    jsparse.generate(jsparse.load("default"), "a", executor="cann")
except jsparse.JsparseError as error:
    print(error)
"""
    path = os.pathsep.join([str(real_torch_npu), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert "torch_npu cannot load CANN (" in lines[-3]
    assert "install the CANN toolkit and source its set_env.sh" in lines[-3]
    assert lines[-2] == "2.0"
    assert lines[-1].startswith("executor 'cann' cannot run here: torch_npu cannot load CANN")
