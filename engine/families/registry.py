"""Finds the family that serves a model. A new family is a file in this folder and a line here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from engine.families.base import TEXT_TYPES, Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_VISION = {
    "chameleon": "chameleon",
    "fuyu": "fuyu",
    "gemma3": "gemma3",
    "idefics3": "idefics3",
    "internvl": "internvl",
    "llava": "llava",
    "llava/pixtral": "pixtral",
    "mistral3": "pixtral",
    "llava_next": "llava_next",
    "llava_onevision": "llava_onevision",
    "mllama": "mllama",
    "paligemma": "paligemma",
    "phi3_v": "phi3_v",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_vl",
    "qwen3_vl": "qwen3_vl",
    "smolvlm": "idefics3",
}
"""Kind of model -> the family's file."""


def kind_of(config: PretrainedConfig) -> str:
    """Return config.json's model_type, with the vision tower's model_type where the family depends on it."""
    kind = f"{config.model_type}/{getattr(getattr(config, 'vision_config', None), 'model_type', None)}"
    return kind if kind in _VISION else str(config.model_type)


def family_of(kind: str) -> Family | None:
    """Return the family; None for a model that is not served. Imports neither torch nor transformers."""
    module = "text" if kind in TEXT_TYPES else _VISION.get(kind)
    if module is None:
        return None
    family: Family = import_module(f"engine.families.{module}").FAMILY
    return family


def register(model_type: str) -> None:
    """Make a family known to transformers' `AutoConfig`, if transformers has no class for it."""
    family = family_of(model_type)
    if family is not None and family.register is not None:
        family.register()


def served() -> str:
    """List the model types that are served, for messages."""
    vision = sorted({kind.partition("/")[0] for kind in _VISION})
    return f"{', '.join(vision)} and the text models {', '.join(TEXT_TYPES)}"
