"""Compile for CUDA GPUs with none at hand: `python -m cuda_aot OUTPUT_DIR` in a process of its own.

Needs the wheels jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc and nvidia-nvvm. Prints a JSON object: of every
case and GPU, the Triton kernels with their registers and spilled bytes per thread; and of decode steps, how many
kernels a layer takes and how many the rest.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

DUMP = Path(sys.argv[1])
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["LLVM_DISABLE_SYMBOLIZATION"] = "1"  # or every warning in XLA's compiler costs a symbolised stack trace
os.environ["XLA_FLAGS"] = f"--xla_dump_to={DUMP} --xla_dump_emitter_re=.* --xla_gpu_autotune_level=0"

# ruff: noqa: E402  JAX reads the environment when it is imported
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

import pallas_kernels
from jsparse.arrays import Rows, Storage
from jsparse.decoding.forward import Model
from jsparse.decoding.loop import initial_state, step_chunk
from jsparse.decoding.sampling import Sampling
from jsparse.executors.kernels import KernelExecutor, activations
from jsparse.model.cache import LayerCache
from jsparse.model.config import PRESETS
from jsparse.model.ffn import KINDS
from jsparse.model.parameters import make_weights
from jsparse.model.weights import Predictor
from pallas_kernels.tiles import choose

GPUS = {
    "sm_80": {
        "name": "NVIDIA A100",
        "minor": 0,
        "major": 8,
        "cores": 108,
        "shared": 166912,
        "l2": 41943040,
        "gbps": 1555,
    },
    "sm_90": {
        "name": "NVIDIA H100",
        "minor": 0,
        "major": 9,
        "cores": 132,
        "shared": 232448,
        "l2": 52428800,
        "gbps": 3350,
    },
}
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared}
  core_count: {cores} fpus_per_core: 128 clock_rate_ghz: 1.4
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gbps}000000000 l2_cache_size: {l2} device_memory_size: 80000000000
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
# name: neurons, width, rank, batch, dtype of the weights, bits of the predictor, kind, parallel
CASES = {
    "llama_published": (11008, 4096, 256, 1, "float16", 16, "fatrelu", False),
    "llama_ours": (11008, 4096, 1024, 1, "float16", 4, "fatrelu", False),
    "llama_int8": (11008, 4096, 1024, 1, "int8", 4, "fatrelu", False),
    "llama_int4": (11008, 4096, 1024, 1, "int4:32", 4, "fatrelu", False),
    "mistral_ours": (14336, 4096, 1024, 1, "bfloat16", 4, "drelu", False),
    "qwen2_ours": (18944, 3584, 896, 1, "bfloat16", 4, "drelu", False),
    "qwen2_batch": (18944, 3584, 448, 8, "bfloat16", 8, "reglu", True),
    "minicpm_float32": (5760, 2304, 576, 2, "float32", 4, "fatrelu", True),
    "odd": (301, 97, 1, 3, "int8", 8, "reglu", False),
    "odd_int4": (301, 97, 1, 3, "int4:32", 8, "reglu", False),
}


def matrix(rows: int, columns: int, dtype: str, struct):
    if dtype == "int4:32":
        return struct(rows, Storage.parse(dtype).row_bytes(columns), dtype="uint8"), struct(16, dtype="float32")
    if dtype == "int4":
        return struct(rows, -(-columns // 2), dtype="uint8"), struct(rows, 1, dtype="float32")
    if dtype == "int8":
        return struct(rows, columns, dtype="int8"), struct(rows, 1, dtype="float32")
    return struct(rows, columns, dtype=dtype)


def operands(case: tuple, struct) -> list:
    """Shapes of x, gate, up, down_t, threshold, a, b and bias."""
    neurons, width, rank, batch, dtype, bits, _, _ = case
    low = {16: "bfloat16", 8: "int8", 4: "int4"}[bits]
    weights = [matrix(neurons, width, dtype, struct) for _ in range(3)]
    predictor = [matrix(rank, width, low, struct), matrix(neurons, rank, low, struct)]
    vector = struct(neurons, dtype="float32")
    return [struct(batch, width, dtype="float32"), *weights, vector, *predictor, vector]


def ffn(case: tuple, gpu: str | None = None):
    """The sparse FFN of a case as a function of its operands."""
    neurons, width, _, _, dtype, _, kind, parallel = case
    tiles = choose(neurons, width, "uint8" if dtype.startswith("int4") else dtype, gpu)

    def sparse_ffn(*arrays):
        options = activations(KINDS[kind])
        return pallas_kernels.sparse_ffn(*arrays, **options, parallel=parallel, tiles=tiles)

    return sparse_ffn


def mesh_of(gpu: str) -> jax.sharding.Mesh:
    """A mesh of one such GPU, which need not be there."""
    target = TARGET.format(**GPUS[gpu])
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    return topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))


def ptxas() -> str:
    for entry in sys.path:
        for found in Path(entry).glob("nvidia/cu*/bin/ptxas"):
            return str(found)
    return "ptxas"


def resources() -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of the Triton kernels compiled since the last call."""
    found = {}
    for path in sorted(DUMP.glob("*.ptx")):
        text = path.read_text()
        names = set(re.findall(r"\.entry (predict_gate_up|down|project|attend|combine)\w*\(", text))
        if names:
            target = re.search(r"\.target (\w+)", text).group(1)
            command = [ptxas(), "-v", f"--gpu-name={target}", str(path), "-o", os.devnull]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
            registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
            found["+".join(sorted(names))] = {"registers": max(registers), "spilled": sum(spills)}
        path.unlink()
    return found


def attention(window: int | None):
    def attend(*arrays):
        return pallas_kernels.attend(*arrays, window=window)

    return attend


def attention_operands(dtype: str, batch: int, heads: int, kv_heads: int, head_dim: int, struct) -> list:
    new = struct(batch, 1, kv_heads, head_dim, dtype="int8" if dtype == "int8" else "float32")
    cache = struct(batch, 1536, kv_heads, head_dim, dtype=dtype)
    query = struct(batch, 1, heads, head_dim, dtype="float32")
    operands = [query, new, new, *[struct(batch, dtype="int32")] * 2, cache, cache]
    if dtype != "int8":
        return operands
    scales = [struct(batch, slots, kv_heads, -(-head_dim // 32), dtype="bfloat16") for slots in (1, 1536)]
    return [*operands, tuple(scale for scale in scales for _ in range(2))]


def count_kernels(shape: str, layers: int, mesh, struct) -> int:
    """Kernels of a sparse decode step of that many layers, greedy, one sequence, bfloat16, 4-bit predictor."""
    config = dataclasses.replace(PRESETS[shape], num_layers=layers)
    width, neurons, rank = config.hidden_size, config.intermediate_size, config.hidden_size // 4

    def int4(rows, columns):
        values, scale = struct(rows, columns // 2, dtype="uint8"), struct(rows, 1, dtype="float32")
        return Rows(values, scale, Storage("int4"), columns)

    def weight(shape):
        return struct(*shape.shape, dtype="bfloat16" if len(shape.shape) == 2 else "float32")

    side = struct(1, 1536, config.num_kv_heads, config.head_dim, dtype="bfloat16")
    one = np.ones(1, np.int32)
    state = jax.eval_shape(lambda: initial_state(one, one, 0, Sampling.create(config.vocab_size)))
    state = jax.tree.map(lambda a: struct(*a.shape, dtype=a.dtype), state)
    predictor = Predictor(int4(rank, width), int4(neurons, rank), struct(neurons, dtype="float32"))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        step_chunk.lower(
            jax.tree.map(weight, jax.eval_shape(lambda: make_weights(config, lambda _, entry: jnp.zeros(entry.shape)))),
            (predictor,) * layers,
            (LayerCache(side, side),) * layers,
            state,
            struct(dtype="int32"),
            model=Model(config, KernelExecutor("cuda"), config.ffn_spec()),
            draws=False,
        ).compile()
    (path,) = DUMP.glob("*step_chunk*.thunk_sequence.txt")
    body = path.read_text().partition("body:")[2]
    path.unlink()
    return len(re.findall(r"^ *\d+: k", body, re.MULTILINE))


def main() -> None:
    jax.devices()  # registers the plugin
    results = {"kernels": {}, "decode": {}}
    for gpu in GPUS:
        mesh = mesh_of(gpu)
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

        def struct(*shape, dtype, sharding=sharding):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        programs = {name: (ffn(case, gpu), operands(case, struct)) for name, case in CASES.items()}
        for dtype in ("bfloat16", "int8"):
            for name, window, *sizes in (("attend", None, 1, 32, 32, 128), ("attend_grouped", 500, 4, 28, 4, 96)):
                programs[f"{name}_{dtype}"] = attention(window), attention_operands(dtype, *sizes, struct)
        for name, (tokens, width) in {"project": (1, 4096), "project_batch": (8, 4096), "project_odd": (3, 97)}.items():
            arrays = struct(tokens, width, dtype="float32"), matrix(301, width, "int4:32", struct)
            programs[name] = pallas_kernels.linear, arrays
        for name, (function, arrays) in programs.items():
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                jax.jit(function).lower(*arrays).compile()
            results["kernels"][f"{name}-{gpu}"] = resources()
    presets = {"Llama-2-7B": "SparseLLM/prosparse-llama-2-7b", "Qwen2-7B": "Tiiny/SparseQwen2-7B"}
    for shape, preset in presets.items():
        two, three = (count_kernels(preset, layers, mesh, struct) for layers in (2, 3))
        results["decode"][shape] = {"layer": three - two, "rest": two - 2 * (three - two)}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
