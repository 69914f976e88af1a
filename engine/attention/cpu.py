"""Paged attention on a CPU: batched matmuls for one-token queries, PyTorch's flash kernel for chunks.

`scaled_dot_product_attention` is an order of magnitude slower than two plain batched matmuls when every
query is one token, so decodes do not use it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from engine.attention.kernel import AttentionKernel, CacheShape, PackedStep


@dataclass(slots=True)
class _DecodeGroup:
    """Decodes of similar context length, gathered together: padding at most doubles their work.

    rows [n]: their places in the packed row; None when they are all decodes, in order.
    blocks [n * width]: block tables, padded with each sequence's own last block.
    lens [n]: context lengths.
    """

    rows: torch.Tensor | None
    blocks: torch.Tensor
    lens: torch.Tensor
    width: int
    size: int
    bias: dict[int | None, torch.Tensor | None]


@dataclass(slots=True)
class _Chunk:
    start: int
    stop: int
    context: int
    blocks: torch.Tensor | None
    masks: dict[int | None, torch.Tensor | None]


class CpuKernel(AttentionKernel):
    """Cache layout: [layers, kv_heads, blocks, block_size * head_dim], so that a gather of blocks is already
    the [kv_heads, batch, context, head_dim] that the batched matmul wants."""

    name = "cpu"

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape)
        size = (shape.num_layers, shape.kv_heads, shape.num_blocks, shape.block_size * shape.head_dim)
        self._keys = torch.zeros(size, dtype=shape.dtype)
        self._values = torch.zeros(size, dtype=shape.dtype)
        slots = (shape.kv_heads, shape.num_blocks * shape.block_size, shape.head_dim)
        self._layers = [
            (keys, values, keys.view(slots), values.view(slots))
            for keys, values in zip(self._keys, self._values, strict=True)
        ]
        self._step: PackedStep | None = None
        self._groups: list[_DecodeGroup] = []
        self._chunks: list[_Chunk] = []

    def begin(self, step: PackedStep) -> None:
        self._step = step
        self._groups = _group_decodes(step)
        self._chunks = [self._chunk(step, i) for i in range(step.num_decodes, step.num_sequences)]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        step = self._step
        assert step is not None, "begin() was not called"
        key_blocks, value_blocks, key_slots, value_slots = self._layers[layer]
        key_heads, value_heads = key.transpose(0, 1), value.transpose(0, 1)
        key_slots.index_copy_(1, step.slots, key_heads)
        value_slots.index_copy_(1, step.slots, value_heads)
        if not self._chunks and len(self._groups) == 1:
            return self._decode(self._groups[0], query, key_blocks, value_blocks, scale, window)
        out = torch.empty_like(query)
        for group in self._groups:
            rows = group.rows
            some = query[: step.num_decodes] if rows is None else query[rows]
            result = self._decode(group, some, key_blocks, value_blocks, scale, window)
            if rows is None:
                out[: step.num_decodes] = result
            else:
                out[rows] = result
        for chunk in self._chunks:
            span = slice(chunk.start, chunk.stop)
            if chunk.blocks is None:
                keys, values = key_heads[:, span], value_heads[:, span]
            else:
                keys = self._gather(key_blocks, chunk.blocks)[:, : chunk.context]
                values = self._gather(value_blocks, chunk.blocks)[:, : chunk.context]
            out[span] = _attend_chunk(query[span], keys, values, scale, _chunk_mask(chunk, window))
        return out

    def scrub(self, blocks: list[int]) -> None:
        index = torch.tensor(blocks)
        self._keys[:, :, index] = 0
        self._values[:, :, index] = 0

    def _gather(self, cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """[kv_heads, blocks, block_size * head_dim] -> [kv_heads, len(blocks) * block_size, head_dim]."""
        picked = cache.index_select(1, blocks)
        return picked.view(self.shape.kv_heads, -1, self.shape.head_dim)

    def _decode(
        self,
        group: _DecodeGroup,
        query: torch.Tensor,
        key_blocks: torch.Tensor,
        value_blocks: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """query [n, heads, head_dim] -> the same shape."""
        count, heads, dim = query.shape
        kv_heads = self.shape.kv_heads
        batch = kv_heads * count
        keys = self._gather(key_blocks, group.blocks).view(batch, -1, dim)
        values = self._gather(value_blocks, group.blocks).view(batch, -1, dim)
        grouped = query.view(count, kv_heads, heads // kv_heads, dim).transpose(0, 1)
        scores = torch.bmm(grouped.reshape(batch, -1, dim), keys.transpose(1, 2)).float().mul_(scale)
        bias = _decode_bias(group, self.shape.block_size, window)
        if bias is not None:
            scores.view(kv_heads, count, heads // kv_heads, -1).add_(bias)
        weights = torch.softmax(scores, -1).to(values.dtype)
        out = torch.bmm(weights, values)
        return out.view(kv_heads, count, heads // kv_heads, dim).transpose(0, 1).reshape(count, heads, dim)

    def _chunk(self, step: PackedStep, index: int) -> _Chunk:
        start, stop = step.query_starts[index], step.query_starts[index + 1]
        context = step.context_lens[index]
        fresh = context == stop - start
        used = -(-context // self.shape.block_size)
        blocks = None if fresh else torch.tensor(step.block_tables[index][:used])
        return _Chunk(start, stop, context, blocks, {})


def _group_decodes(step: PackedStep) -> list[_DecodeGroup]:
    count, size = step.num_decodes, step.block_size
    if count == 0:
        return []
    widths = [-(-context // size) for context in step.context_lens[:count]]
    if max(widths) <= 2 * min(widths):
        return [_decode_group(step, list(range(count)), None)]
    order = sorted(range(count), key=widths.__getitem__, reverse=True)
    groups: list[_DecodeGroup] = []
    start = 0
    for place in range(1, count + 1):
        if place == count or 2 * widths[order[place]] < widths[order[start]]:
            members = order[start:place]
            groups.append(_decode_group(step, members, torch.tensor(members)))
            start = place
    return groups


def _decode_group(step: PackedStep, members: list[int], rows: torch.Tensor | None) -> _DecodeGroup:
    size = step.block_size
    width = max(-(-step.context_lens[i] // size) for i in members)
    blocks: list[int] = []
    for i in members:
        used = -(-step.context_lens[i] // size)
        table = step.block_tables[i][:used]
        blocks += table
        blocks += table[-1:] * (width - used)
    lens = torch.tensor([step.context_lens[i] for i in members])
    return _DecodeGroup(rows, torch.tensor(blocks), lens, width, len(members), {})


def _decode_bias(group: _DecodeGroup, block_size: int, window: int | None) -> torch.Tensor | None:
    """[n, 1, padded context]: 0 where the one query may look, -inf elsewhere; the same for all layers."""
    if window not in group.bias:
        place = torch.arange(group.width * block_size)
        lens = group.lens[:, None]
        hidden = place >= lens
        if window is not None:
            hidden = hidden | (place < lens - window)
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, :]
        group.bias[window] = bias if bool(hidden.any()) else None
    return group.bias[window]


def _chunk_mask(chunk: _Chunk, window: int | None) -> torch.Tensor | None:
    """[queries, context] of booleans, True where a query may look; None for plain causal from position 0."""
    if window is not None and window >= chunk.context:
        window = None
    if window not in chunk.masks:
        mask = None
        if chunk.blocks is not None or window is not None:
            position = torch.arange(chunk.context - (chunk.stop - chunk.start), chunk.context)[:, None]
            seen = torch.arange(chunk.context)[None, :]
            mask = seen <= position
            if window is not None:
                mask &= seen > position - window
        chunk.masks[window] = mask
    return chunk.masks[window]


def _attend_chunk(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """query [queries, heads, dim]; keys, values [kv_heads, context, dim] -> [queries, heads, dim]."""
    groups = query.shape[1] // keys.shape[0]
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
    out = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return out[0].transpose(0, 1)
