"""GGUF files for llama.cpp are written here, of random matrices or a model's, quantised by llama.cpp, and read."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np

import jsparse
from jsparse.model.parameters import parameters

FILE_TYPES = {"q4_0": 2, "q4_k_m": 15}
"""llama.cpp's codes of the types to which it quantises a file itself; some matrices then have more bits."""
_NAMES = {
    "attention/q/rows": "attn_q",
    "attention/k/rows": "attn_k",
    "attention/v/rows": "attn_v",
    "attention/o/rows": "attn_output",
    "ffn/gate": "ffn_gate",
    "ffn/up": "ffn_up",
    "ffn/down_t": "ffn_down",
}


def tensor_name(path: str) -> str | None:
    """Name the layer's matrix at a path of `Weights` as GGUF does; None where the path is of another array."""
    folder, _, name = path.partition("/")
    layer, _, name = name.partition("/")
    return f"blk.{layer}.{_NAMES[name]}.weight" if folder == "layers" and name in _NAMES else None


def random_matrices() -> Callable[[str, tuple[int, int]], np.ndarray]:
    """Make a source of random matrices for `write_gguf`, which gives one array for all of a shape."""
    rng, made = np.random.default_rng(0), {}

    def matrix(name: str, shape: tuple[int, int]) -> np.ndarray:
        if shape not in made:
            made[shape] = rng.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)
        return made[shape]

    return matrix


def write_gguf(
    path: Path, config: jsparse.ModelConfig, dtype: str, matrix: Callable[[str, tuple[int, int]], np.ndarray]
) -> None:
    """Write a GGUF file of the llama architecture without a tokenizer, its norms all ones.

    Args:
      dtype: f32, bf16 or q8_0.
      matrix: gives the float32 matrix (out, in) of a tensor's name and shape.
    """
    import gguf

    kind, file_type = {
        "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
        "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    }[dtype]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(file_type)
    encoded: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def add(name: str, *shape: int) -> None:
        exact = matrix(name, shape)
        if id(exact) not in encoded:  # keeps the array, so that its id is not given to another
            encoded[id(exact)] = exact, gguf.quants.quantize(exact, kind)
        writer.add_tensor(name, encoded[id(exact)][1], raw_dtype=kind)

    ones = np.ones(config.hidden_size, np.float32)
    for name in ("token_embd.weight", "output.weight"):
        add(name, config.vocab_size, config.hidden_size)
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(config.num_layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", ones)
    for path, entry in parameters(config).items():
        if name := tensor_name(path):
            add(name, *(entry.shape[::-1] if path.endswith("down_t") else entry.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_gguf(path: Path, dtype: str) -> Path:
    """Have llama.cpp make a file of few bits beside the given one, which is deleted."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = FILE_TYPES[dtype]
    quantized = path.with_name(f"{dtype}.gguf")
    if llama_cpp.llama_model_quantize(str(path).encode(), str(quantized).encode(), ctypes.byref(options)):
        raise SystemExit(f"llama.cpp cannot make a file in {dtype}")
    path.unlink()
    return quantized


def read_gguf(path: Path) -> dict[str, tuple[np.ndarray, int]]:
    """Read every tensor of a file by its name: in float32, and the bytes that it takes in the file."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    return {t.name: (gguf.quants.dequantize(t.data, t.tensor_type), int(t.n_bytes)) for t in tensors}


def read_bytes(path: Path) -> int:
    """Count the bytes of a file's tensors but for the embedding, of which a token reads a row."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    return sum(int(tensor.n_bytes) for tensor in tensors if tensor.name != "token_embd.weight")
