"""Which family serves a model. A new family is a file in this folder and a line here."""

from __future__ import annotations

from importlib import import_module

from engine.families.base import Family
from engine.families.text import TEXT_TYPES

_VISION = {
    "chameleon": "chameleon",
    "fuyu": "fuyu",
    "gemma3": "gemma3",
    "idefics3": "idefics3",
    "internvl": "internvl",
    "llava": "llava",
    "mllama": "mllama",
    "paligemma": "paligemma",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_vl",
    "qwen3_vl": "qwen3_vl",
    "smolvlm": "idefics3",
}
"""config.json's `model_type` -> the family's file."""


def family_of(model_type: str) -> Family | None:
    """None for a model that is not served. Imports neither torch nor transformers."""
    module = "text" if model_type in TEXT_TYPES else _VISION.get(model_type)
    if module is None:
        return None
    family: Family = import_module(f"engine.families.{module}").FAMILY
    return family


def served() -> str:
    """For messages: the model types that are served."""
    return f"{', '.join(sorted(_VISION))} and the text models {', '.join(TEXT_TYPES)}"
