"""Text-only decoders whose layers use transformers' attention interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.families.base import Family, FamilyModel

if TYPE_CHECKING:
    import torch


class TextModel(FamilyModel):
    auto_class = "AutoModelForCausalLM"

    def encode(self, images: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        raise ValueError("this model does not take images")


FAMILY = Family(TextModel)
