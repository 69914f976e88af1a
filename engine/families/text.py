"""Text-only decoders whose layers use transformers' attention interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.errors import ModelLoadError
from engine.families.base import Family, FamilyModel

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

TEXT_TYPES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""Decoders that are tested to give the tokens of transformers' own `generate`."""


class TextModel(FamilyModel):
    auto_class = "AutoModelForCausalLM"

    @property
    def decoder(self) -> torch.nn.Module:
        decoder: torch.nn.Module = self.model.base_model
        return decoder

    @property
    def text_config(self) -> PretrainedConfig:
        return self.model.config

    def encode(self, images: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        raise ValueError("this model does not take images")


def check_text(config: PretrainedConfig) -> None:
    """Check that the decoder of a vision model is served.

    Raises:
        ModelLoadError: It is not.
    """
    if config.model_type not in TEXT_TYPES:
        raise ModelLoadError(
            f"its decoder is of type {config.model_type!r}, which the embedded engine does not serve; it serves "
            f"{', '.join(TEXT_TYPES)}"
        )


FAMILY = Family(TextModel)
