"""The families of checkpoints, one file each: model types, defaults, names, and what they alone say in config.json."""

from convert.families.bamboo import BAMBOO
from convert.families.family import Family
from convert.families.llama import LLAMA, SPARSELLAMA
from convert.families.minicpm import MINICPM
from convert.families.mistral import MISTRAL
from convert.families.qwen2 import QWEN2

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, SPARSELLAMA, MISTRAL, BAMBOO, QWEN2, MINICPM)
}
"""By model type."""

__all__ = ["FAMILIES", "Family"]
