"""Llava 1.5: a CLIP or SigLIP tower, a two-layer projector, and a Llama, Mistral or Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

from engine.families.base import Family


class LlavaFamily(Family):
    @property
    def decoder(self) -> torch.nn.Module:
        decoder: torch.nn.Module = self.model.model.language_model
        return decoder

    @property
    def head(self) -> torch.nn.Module:
        head: torch.nn.Module = self.model.lm_head
        return head

    @property
    def text_config(self) -> PretrainedConfig:
        config: PretrainedConfig = self.model.config.text_config
        return config

    def encode(self, pictures: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        pixels = torch.stack([picture["pixel_values"] for picture in pictures])
        features = self.model.model.get_image_features(
            pixel_values=pixels.to(self.model.dtype), return_dict=True
        )
        return list(features.pooler_output)
