"""Rotary frequencies that depend on how long a request is: LongRoPE's, of Phi-3 (Ding et al. 2024).

Up to the model's original length a request has one set of frequencies, beyond it another, for all its tokens.
transformers chooses by the largest position of the whole row, which in a packed row is another request's.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class LongRope(torch.nn.Module):
    """Takes the place of a decoder's `rotary_emb`.

    limit: the most tokens of a request that has the short set. is_long [tokens]: set before each step.
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
        """Put into the decoder's place for it; None where the frequencies are always the same."""
        own = getattr(decoder, "rotary_emb", None)
        if own is None or getattr(own, "rope_type", None) != "longrope":
            return None
        decoder.rotary_emb = made = cls(own)
        return made

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: of the dtype that is wanted. position_ids [1, tokens] -> cosines and sines [1, tokens, rotary dim]."""
        angles = position_ids[..., None].float() * self.frequencies[self.is_long.long()]
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self._scaling, angles.sin() * self._scaling
        return cos.to(x.dtype), sin.to(x.dtype)
