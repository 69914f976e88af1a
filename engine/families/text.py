"""Text-only decoders whose layers transformers routes through its attention interface: Llama, Mistral, Qwen2, …"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from engine.families.base import Family


class TextFamily(Family):
    @property
    def decoder(self) -> torch.nn.Module:
        decoder: torch.nn.Module = self.model.base_model
        return decoder

    @property
    def head(self) -> torch.nn.Module:
        head: torch.nn.Module = self.model.lm_head
        return head

    @property
    def text_config(self) -> PretrainedConfig:
        return self.model.config
