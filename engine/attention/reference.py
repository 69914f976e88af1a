"""Attention by its formula, one sequence at a time in float32; the other kernels are tested against it."""

from __future__ import annotations

import torch

from engine.attention.kernel import AttentionKernel, CacheShape, PackedStep


class ReferenceKernel(AttentionKernel):
    """Cache layout: [layers, slots, kv_heads, head_dim], with keys and values in separate tensors."""

    name = "reference"

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape)
        size = (shape.num_layers, shape.num_blocks * shape.block_size, shape.kv_heads, shape.head_dim)
        self._keys = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        self._values = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        self._step: PackedStep | None = None

    def begin(self, step: PackedStep) -> None:
        self._step = step

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        step = self._step
        assert step is not None, "begin() was not called"
        self._keys[layer, step.slots] = key
        self._values[layer, step.slots] = value
        groups = query.shape[1] // key.shape[1]
        out = torch.empty_like(query)
        for index, context in enumerate(step.context_lens):
            start, stop = step.query_starts[index], step.query_starts[index + 1]
            slots = torch.tensor(
                [
                    step.block_tables[index][p // step.block_size] * step.block_size + p % step.block_size
                    for p in range(context)
                ],
                device=query.device,
            )
            keys = self._keys[layer, slots].float().repeat_interleave(groups, dim=1)
            values = self._values[layer, slots].float().repeat_interleave(groups, dim=1)
            scores = torch.einsum("qhd,khd->hqk", query[start:stop].float(), keys) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            hidden = step.hidden(index, window, query.device)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[start:stop] = torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)
        return out

    def scrub(self, blocks: list[int]) -> None:
        size = self.shape.block_size
        for block in blocks:
            self._keys[:, block * size : (block + 1) * size] = 0
            self._values[:, block * size : (block + 1) * size] = 0
