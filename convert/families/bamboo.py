"""Bamboo and TurboSparse: Mistral with ReLU on gate and up."""

from convert.families import mistral
from convert.families.family import Family

BAMBOO = Family("bamboo", "BambooForCausalLM", mistral.DEFAULTS, mistral.read, mistral.write, ffn_kind="drelu")
