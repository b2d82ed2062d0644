"""llama.cpp and transformers on random weights of a given shape, for `benchmarks.decode`."""

import ctypes
import os
import tempfile
import weakref
from pathlib import Path

import jsparse
from benchmarks.gguf_files import FILE_TYPES, quantize_gguf, random_matrices, read_bytes, write_gguf
from benchmarks.report import seconds


class LlamaCpp:
    """llama.cpp through llama-cpp-python, on a file of random weights. `run` decodes that many tokens around that
    context and returns the seconds of one; `read` is the bytes of the weights that a token reads."""

    def __init__(self, config: jsparse.ModelConfig, dtype: str, kv_dtype: str, context: int, tokens: int):
        """`kv_dtype` is f16 or q8_0."""
        import llama_cpp

        self._lib, self._tokens, self._begin = llama_cpp, tokens, context - tokens // 2
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "random.gguf"
            write_gguf(path, config, "bf16" if dtype in FILE_TYPES else dtype, random_matrices())
            if dtype in FILE_TYPES:
                path = quantize_gguf(path, dtype)
            self.read = read_bytes(path)
            options = llama_cpp.llama_model_default_params()
            options.use_mmap = False
            self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise SystemExit("llama.cpp cannot load the file that was written for it")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = context + tokens + 64
        if kv_dtype == "q8_0":
            options.type_k = options.type_v = llama_cpp.GGML_TYPE_Q8_0
            options.flash_attn_type = 1  # without it values cannot be of few bits
        threads = len(os.sched_getaffinity(0))
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise SystemExit(f"llama.cpp makes no context with a KV cache in {kv_dtype}")
        weakref.finalize(self, llama_cpp.llama_model_free, self._model)
        weakref.finalize(self, llama_cpp.llama_free, self._context)  # finalizers run from the last to the first
        for begin in range(0, self._begin, 512):
            self._decode([1] * min(512, self._begin - begin))

    def _decode(self, ids: list[int]) -> None:
        array = (self._lib.llama_token * len(ids))(*ids)
        if self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(array, len(ids))):
            raise SystemExit("llama.cpp failed to decode")

    def run(self) -> float:
        memory = self._lib.llama_get_memory(self._context)
        self._lib.llama_memory_seq_rm(memory, 0, self._begin, -1)

        def steps():
            for i in range(self._tokens):
                self._decode([1 + i])
                self._lib.llama_get_logits(self._context)

        return seconds(steps) / self._tokens


class Transformers:
    """transformers in PyTorch: eager with its dynamic cache, or compiled with a static one."""

    def __init__(
        self,
        config: jsparse.ModelConfig,
        context: int,
        tokens: int,
        *,
        device: str = "cpu",
        dtype: str = "bfloat16",
        compiled: bool = False,
    ):
        import torch
        import transformers

        self._torch, self._tokens, self._begin, self._device = torch, tokens, context - tokens // 2, device
        shape = transformers.LlamaConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            hidden_act="relu",
            max_position_embeddings=config.context_length,
            dtype=getattr(torch, dtype),
        )
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(shape)
        model = model.to(getattr(torch, dtype)).to_empty(device=device).eval()
        for parameter in model.parameters():
            parameter.data.fill_(0.01)
        model.model.rotary_emb.__init__(shape)  # its frequencies are no parameters
        model.model.rotary_emb.to(device)
        self._cache = (
            transformers.StaticCache(config=shape, max_cache_len=context + tokens)
            if compiled
            else transformers.DynamicCache()
        )
        self._compiled, self._forward = compiled, model.forward
        self._feed([1] * self._begin)
        if compiled:
            self._forward = torch.compile(model.forward, mode="reduce-overhead", dynamic=False)

    def _feed(self, ids: list[int]) -> None:
        with self._torch.inference_mode():
            ids = self._torch.tensor([ids], device=self._device)
            self._forward(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def run(self) -> float:
        def steps():
            for i in range(self._tokens):
                self._feed([1 + i])
            if self._device == "cuda":
                self._torch.cuda.synchronize()

        taken = seconds(steps)
        if self._compiled:
            with self._torch.inference_mode():
                for layer in self._cache.layers:
                    layer.cumulative_length.sub_(self._tokens)
        else:
            self._cache.crop(-self._tokens)
        return taken / self._tokens
