"""How many devices can share the attention of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from properties.model import text_config

_SHARED_TOWERS = frozenset({"clip_vision_model", "siglip_vision_model", "pixtral"})
"""Vision towers that vLLM shares by as many devices as the language model; in some others it copes with any number."""


@dataclass(frozen=True)
class Heads:
    """Of the language model. attention: heads that ask. key_values: those that they ask, at most as many.

    vision: of the tower, where its devices must share it evenly, too; else 0.
    """

    attention: int
    key_values: int
    vision: int = 0

    def divide_by(self, degree: int) -> bool:
        """Whether vLLM can give each of so many devices its heads: as many of `attention` to each, and each of
        `key_values` to one device, or copied to several."""
        shared = self.key_values % degree == 0 or degree % self.key_values == 0
        return self.attention % degree == 0 and shared and self.vision % degree == 0

    def largest_degree(self, most: int) -> int:
        """The largest number of devices up to `most` that can share one copy."""
        return next(degree for degree in range(most, 0, -1) if degree == 1 or self.divide_by(degree))

    def __str__(self) -> str:
        tower = f" and its vision tower's {self.vision} heads" if self.vision else ""
        return f"{self.attention} attention and {self.key_values} key/value heads{tower}"


def heads_of(config: Mapping[str, Any]) -> Heads | None:
    """From a config.json with its family's defaults filled in; None where it does not say."""
    text = text_config(config)
    attention = _count(text, "num_attention_heads", "n_head", "n_heads")
    if attention is None:
        return None
    # With latent attention the devices share no keys and values.
    latent = "kv_lora_rank" in text
    key_values = _count(text, "num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num")
    tower = config.get("vision_config")
    vision = None
    if isinstance(tower, Mapping) and tower.get("model_type") in _SHARED_TOWERS:
        vision = _count(tower, "num_attention_heads")
    return Heads(attention, attention if latent or key_values is None else key_values, vision or 0)


def model_heads(directory: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> Heads | None:
    """Of a model directory. Imports transformers where config.json leaves the numbers to the family's defaults.

    With trust_remote_code the family may be the model's own code, which is not run for this.
    """
    if trust_remote_code or {"num_attention_heads", "num_key_value_heads"} <= text_config(config).keys():
        return heads_of(config)
    from transformers import AutoConfig

    try:
        return heads_of(AutoConfig.from_pretrained(directory, local_files_only=True).to_dict())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _count(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return None
