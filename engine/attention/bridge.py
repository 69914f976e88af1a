"""How transformers' modelling code reaches our kernel: one function registered in its `AttentionInterface`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from engine.attention.kernel import AttentionKernel

IMPLEMENTATION = "rolling"
"""The name for `attn_implementation`. transformers builds no mask for an implementation it does not know, which
is what a packed row needs."""


def rolling_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    kernel: AttentionKernel,
    tokens: int,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, tokens, head_dim]; key, value [1, kv_heads, tokens, head_dim] -> [1, tokens, heads, head_dim].

    Only the first `tokens` are real, the others are padding. `kernel` and `tokens` arrive as keyword arguments of
    the model's own forward, which hands them down unchanged.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = kernel.attend(
        layer,
        query[0, :, :tokens].transpose(0, 1),
        key[0, :, :tokens].transpose(0, 1),
        value[0, :, :tokens].transpose(0, 1),
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    padding = query.shape[2] - tokens
    if padding:
        out = torch.nn.functional.pad(out, (0, 0, 0, 0, 0, padding))
    return out.unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, rolling_attention)
