"""Workload shapes of the benchmarks."""

from jsparse.model.config import PRESETS, ModelConfig

SHAPES: dict[str, ModelConfig] = {
    "Llama-2-7B": PRESETS["SparseLLM/prosparse-llama-2-7b"],
    "Mistral-7B": PRESETS["Tiiny/TurboSparse-Mistral-Instruct"],
    "Qwen2-7B": PRESETS["Tiiny/SparseQwen2-7B"],
    "MiniCPM-1B": PRESETS["openbmb/MiniCPM-S-1B-sft"],
}
