"""Rotary frequencies that depend on the length of a request: LongRoPE of Phi-3 (Ding et al. 2024).

Up to the model's original length a request uses one set of frequencies for all its tokens, beyond it another.
transformers chooses by the largest position of the whole row, which in a packed row belongs to another request.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class LongRope(torch.nn.Module):
    """Replacement for a decoder's `rotary_emb`.

    Attributes:
        frequencies: [2, rotary dim / 2]: short and long.
        limit: Greatest number of tokens of a request that uses the short set.
        is_long: [tokens], set before each step.
    """

    frequencies: torch.Tensor

    def __init__(self, own: torch.nn.Module) -> None:
        super().__init__()
        config: Any = own.config
        device: Any = own.inv_freq.device
        self.limit = int(config.rope_parameters["original_max_position_embeddings"])
        compute = ROPE_INIT_FUNCTIONS["longrope"]
        short, self._scaling = compute(config, device)
        long, _ = compute(config, device, seq_len=self.limit + 1)
        self.register_buffer("frequencies", torch.stack([short, long]), persistent=False)
        self.is_long = torch.zeros(0, dtype=torch.bool)

    @classmethod
    def of(cls, decoder: torch.nn.Module) -> LongRope | None:
        """Install one in the decoder; None if its frequencies are always the same."""
        own = getattr(decoder, "rotary_emb", None)
        if own is None or getattr(own, "rope_type", None) != "longrope":
            return None
        decoder.rotary_emb = made = cls(own)
        return made

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute cosines and sines.

        Args:
            x: Any tensor of the requested type.
            position_ids: [1, tokens].

        Returns:
            Cosines and sines, [1, tokens, rotary dim] each.
        """
        angles = position_ids[..., None].float() * self.frequencies.index_select(0, self.is_long.long())
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self._scaling, angles.sin() * self._scaling
        return cos.to(x.dtype), sin.to(x.dtype)
