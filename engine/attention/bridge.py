"""Connects transformers' modelling code to our kernels, by a function registered in its `AttentionInterface`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from engine.attention.kernel import AttentionKernel

IMPLEMENTATION = "rolling"
"""Name for `attn_implementation`. transformers builds no mask for an implementation that it does not know,
which is what a packed row needs."""


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
    """Call the kernel for a layer; `kernel` and `tokens` are arguments of the model's `forward`, which passes them on.

    Args:
        module: The attention layer.
        query: [1, heads, tokens, head_dim].
        key: [1, kv_heads, tokens, head_dim].
        value: [1, kv_heads, tokens, head_dim].
        attention_mask: Ignored.
        kernel: Kernel to call.
        tokens: Number of real tokens; the others are padding.
        scaling: Factor for the scores.
        sliding_window: Length of the window in tokens.
        softcap: Limit of the scores.

    Returns:
        [1, tokens, heads, head_dim], and None.
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
