"""Paged attention in plain torch, on any device.

The blocks are gathered. Then batched matmuls compute the one-token queries, and
`scaled_dot_product_attention` the chunks. On a CPU the latter is several times slower than two plain batched
matmuls when every query is one token, so decodes do not use it (`bench/attention.py` measures both), and a third
slower in bfloat16, so there chunks do not use it either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from engine.attention.kernel import CacheShape, PackedStep, StaticKernel, StaticStep

_QUERIES = 64
"""Number of queries whose scores are computed at a time, where they are stored."""

MASK_ENTRIES = 1 << 25
"""Greatest size of a mask, [queries, context]: the queries of a larger one are computed some at a time. An entry takes
up to 8 bytes while `scaled_dot_product_attention` runs, so a mask takes up to 256 MiB."""


@dataclass(slots=True)
class DecodeGroup:
    """Decodes of similar context length, gathered together: padding at most doubles their work.

    Attributes:
        rows: [n]: their indices in the packed row; None if the group holds all decodes, in order.
        blocks: [n * width]: block tables, padded with each sequence's own last block.
        contexts: Context length of each decode.
        shortest: Least of them, or less.
        longest: Greatest of them, or more.
        width: Blocks per decode.
        bias: Masks by window; see `GatherKernel._decode_bias`.
    """

    rows: torch.Tensor | None
    blocks: torch.Tensor
    contexts: list[int] | torch.Tensor
    shortest: int
    longest: int
    width: int
    bias: dict[int | None, torch.Tensor | None]


@dataclass(slots=True)
class _Chunk:
    index: int
    start: int
    stop: int
    context: int
    blocks: torch.Tensor | None
    masks: dict[int | None, torch.Tensor | CausalBias | None]


def cap_scores(scores: torch.Tensor, cap: float, *, exact: bool) -> None:
    """Replace float32 scores by cap * tanh(score / cap).

    Unless exact, by its equal cap * (2 * sigmoid(2 * score / cap) - 1), which a CPU computes five times as fast. That
    loses less than 1e-6 of the cap, far less than scores of 16-bit queries and keys have lost before.
    """
    if exact:
        scores.div_(cap).tanh_().mul_(cap)
    else:
        scores.mul_(2 / cap).sigmoid_().mul_(2 * cap).sub_(cap)


class GatherKernel(StaticKernel):
    """Cache layout: [layers, kv_heads, blocks, block_size * head_dim].

    A gather of blocks is thus already the [kv_heads, batch, context, head_dim] that the batched matmul needs.
    """

    name: ClassVar[str] = "torch"

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape)
        size = (shape.num_layers, shape.kv_heads, shape.num_blocks, shape.block_size * shape.head_dim)
        self._keys, self._values = self._zeros(size), self._zeros(size)
        slots = (shape.kv_heads, shape.num_blocks * shape.block_size, shape.head_dim)
        self._layers = [
            (keys, values, keys.view(slots), values.view(slots))
            for keys, values in zip(self._keys, self._values, strict=True)
        ]
        self._step: PackedStep | None = None
        self._slots = torch.empty(0, dtype=torch.long)
        self._groups: list[DecodeGroup] = []
        self._chunks: list[_Chunk] = []

    def _zeros(self, size: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(size, dtype=self.shape.dtype, device=self.shape.device)

    def begin(self, step: PackedStep) -> None:
        self._step, self._slots = step, step.slots
        self._groups = self._group_decodes(step)
        self._chunks = [self._chunk(step, i) for i in range(step.num_decodes, step.num_sequences)]

    def begin_static(self, step: StaticStep) -> None:
        width = step.block_tables.shape[1]
        longest = width * self.shape.block_size
        self._slots, self._chunks = step.slots, []
        self._groups = [DecodeGroup(None, step.block_tables.flatten(), step.context_lens, 1, longest, width, {})]

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
        _, _, key_slots, value_slots = self._layers[layer]
        key_heads, value_heads = key.transpose(0, 1), value.transpose(0, 1)
        key_slots.index_copy_(1, self._slots, key_heads)
        value_slots.index_copy_(1, self._slots, value_heads)
        if not self._chunks:
            return self._attend_decodes(layer, query, scale, window, softcap)
        step = self._step
        assert step is not None, "begin() was not called"
        out = torch.empty_like(query)
        if step.num_decodes:
            out[: step.num_decodes] = self._attend_decodes(layer, query[: step.num_decodes], scale, window, softcap)
        for chunk in self._chunks:
            span = slice(chunk.start, chunk.stop)
            out[span] = self._attend_chunk(
                layer, chunk, query[span], key_heads[:, span], value_heads[:, span], scale, window, softcap
            )
        return out

    def scrub(self, blocks: list[int]) -> None:
        index = torch.tensor(blocks, device=self.shape.device)
        self._keys[:, :, index] = 0
        self._values[:, :, index] = 0

    def _attend_decodes(
        self,
        layer: int,
        query: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Compute queries [decodes, heads, head_dim]; the result has the same shape."""
        if len(self._groups) == 1 and self._groups[0].rows is None:
            return self._decode(layer, self._groups[0], query, scale, window, softcap)
        out = torch.empty_like(query)
        for group in self._groups:
            out[group.rows] = self._decode(layer, group, query[group.rows], scale, window, softcap)
        return out

    def _decode(
        self,
        layer: int,
        group: DecodeGroup,
        query: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Compute queries [n, heads, head_dim] of a group; the result has the same shape."""
        count, heads, dim = query.shape
        kv_heads = self.shape.kv_heads
        batch = kv_heads * count
        keys, values = (self._gather(cache, group.blocks).view(batch, -1, dim) for cache in self._layers[layer][:2])
        grouped = query.view(count, kv_heads, heads // kv_heads, dim).transpose(0, 1)
        # A power of two is taken out of the scale beforehand, which is exact and keeps float16 scores finite.
        power = 2.0 ** math.floor(math.log2(scale))
        scores = torch.bmm(grouped.reshape(batch, -1, dim) * power, keys.transpose(1, 2)).float()
        if scale != power:
            scores.mul_(scale / power)
        if softcap is not None:
            cap_scores(scores, softcap, exact=query.dtype == torch.float32)
        bias = self._decode_bias(group, window)
        if bias is not None:
            scores.view(kv_heads, count, heads // kv_heads, -1).add_(bias)
        weights = torch.softmax(scores, -1).to(values.dtype)
        out = torch.bmm(weights, values)
        return out.view(kv_heads, count, heads // kv_heads, dim).transpose(0, 1).reshape(count, heads, dim)

    def _decode_bias(self, group: DecodeGroup, window: int | None) -> torch.Tensor | None:
        """[n, 1, padded context]: 0 where the query may look, -inf elsewhere; the same for all layers."""
        if window is not None and window >= group.longest:
            window = None
        if window not in group.bias:
            padded = group.width * self.shape.block_size
            bias = None
            if window is not None or group.shortest < padded:
                place = torch.arange(padded, device=self.shape.device)
                contexts = torch.as_tensor(group.contexts, device=self.shape.device)[:, None]
                hidden = place >= contexts
                if window is not None:
                    hidden = hidden | (place < contexts - window)
                bias = torch.zeros(hidden.shape, device=self.shape.device)
                bias = bias.masked_fill_(hidden, float("-inf"))[:, None, :]
            group.bias[window] = bias
        return group.bias[window]

    def _attend_chunk(
        self,
        layer: int,
        chunk: _Chunk,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Compute a chunk's queries [queries, heads, dim].

        `keys` and `values` are those of this step, [kv_heads, queries, dim].
        """
        if chunk.blocks is not None:
            keys, values = (self._gather(cache, chunk.blocks)[:, : chunk.context] for cache in self._layers[layer][:2])
        if softcap is not None or (query.device.type == "cpu" and query.dtype == torch.bfloat16):
            return self._in_parts(chunk, query, keys, values, scale, window, softcap)
        groups = query.shape[1] // self.shape.kv_heads
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
        some = max(1, MASK_ENTRIES // chunk.context)
        if len(query) <= some or self._is_causal(chunk, window):
            return _masked(query, keys, values, self._chunk_mask(chunk, window), scale)
        assert self._step is not None
        out = torch.empty_like(query)
        for start in range(0, len(query), some):
            part = slice(start, start + some)
            mask = ~self._step.hidden(chunk.index, window, self.shape.device, part)
            out[part] = _masked(query[part], keys, values, mask, scale)
        return out

    def _in_parts(
        self,
        chunk: _Chunk,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Compute some queries at a time, which bounds the scores' memory; keys, values [kv_heads, context, dim]."""
        assert self._step is not None
        count, heads, dim = query.shape
        kv_heads = self.shape.kv_heads
        out = torch.empty_like(query)
        for start in range(0, count, _QUERIES):
            stop = min(start + _QUERIES, count)
            # Without spans no query of this part sees the tokens of the later ones.
            seen = chunk.context if self._step.spans else chunk.context - (count - stop)
            part = query[start:stop].view(-1, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)
            scores = torch.bmm(part.reshape(kv_heads, -1, dim), keys[:, :seen].transpose(1, 2)).float().mul_(scale)
            if softcap is not None:
                cap_scores(scores, softcap, exact=query.dtype == torch.float32)
            hidden = self._step.hidden(chunk.index, window, self.shape.device, slice(start, stop))[:, :seen]
            scores.view(*part.shape[:3], seen).masked_fill_(hidden, float("-inf"))
            weights = torch.softmax(scores, -1).to(values.dtype)
            out[start:stop] = torch.bmm(weights, values[:, :seen]).view(part.shape).permute(2, 0, 1, 3).flatten(1, 2)
        return out

    def _chunk_mask(self, chunk: _Chunk, window: int | None) -> torch.Tensor | CausalBias | None:
        """[queries, context] of booleans, True where a query may look; None for plain causal from position 0."""
        if window is not None and window >= chunk.context:
            window = None
        if window not in chunk.masks:
            chunk.masks[window] = self._build_mask(chunk, window)
        return chunk.masks[window]

    def _build_mask(self, chunk: _Chunk, window: int | None) -> torch.Tensor | CausalBias | None:
        assert self._step is not None
        if self._is_causal(chunk, window):
            fresh = chunk.blocks is None
            return None if fresh else causal_lower_right(chunk.stop - chunk.start, chunk.context)
        return ~self._step.hidden(chunk.index, window, self.shape.device)

    def _is_causal(self, chunk: _Chunk, window: int | None) -> bool:
        """Whether `scaled_dot_product_attention` needs no mask, since it knows this kind."""
        assert self._step is not None
        if window is not None and window < chunk.context:
            return False
        if self._step.spans and self._step.spans[chunk.index]:
            return False
        return chunk.blocks is None or self.shape.device.type == "cuda"

    def _gather(self, cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """[kv_heads, blocks, block_size * head_dim] -> [kv_heads, len(blocks) * block_size, head_dim]."""
        picked = cache.index_select(1, blocks)
        return picked.view(self.shape.kv_heads, -1, self.shape.head_dim)

    def _chunk(self, step: PackedStep, index: int) -> _Chunk:
        start, stop = step.query_starts[index], step.query_starts[index + 1]
        context = step.context_lens[index]
        fresh = context == stop - start
        used = -(-context // self.shape.block_size)
        blocks = None if fresh else torch.tensor(step.block_tables[index][:used], device=self.shape.device)
        return _Chunk(index, start, stop, context, blocks, {})

    def _group_decodes(self, step: PackedStep) -> list[DecodeGroup]:
        count, size = step.num_decodes, step.block_size
        if count == 0:
            return []
        widths = [-(-context // size) for context in step.context_lens[:count]]
        if max(widths) <= 2 * min(widths):
            return [self._decode_group(step, list(range(count)), None)]
        order = sorted(range(count), key=widths.__getitem__, reverse=True)
        groups: list[DecodeGroup] = []
        start = 0
        for place in range(1, count + 1):
            if place == count or 2 * widths[order[place]] < widths[order[start]]:
                members = order[start:place]
                rows = torch.tensor(members, device=self.shape.device)
                groups.append(self._decode_group(step, members, rows))
                start = place
        return groups

    def _decode_group(self, step: PackedStep, members: list[int], rows: torch.Tensor | None) -> DecodeGroup:
        tables = padded_tables(step, members)
        contexts = [step.context_lens[i] for i in members]
        blocks = torch.tensor(tables, device=self.shape.device).flatten()
        return DecodeGroup(rows, blocks, contexts, min(contexts), max(contexts), len(tables[0]), {})


def _masked(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | CausalBias | None,
    scale: float,
) -> torch.Tensor:
    """Attend with queries [queries, heads, dim] to keys and values [heads, context, dim]; None masks causally."""
    out = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return out[0].transpose(0, 1)


def padded_tables(step: PackedStep, members: list[int]) -> list[list[int]]:
    """Return the blocks of those sequences; each row is padded with the sequence's own last block."""
    used = [-(-step.context_lens[i] // step.block_size) for i in members]
    width = max(used)
    rows = []
    for index, count in zip(members, used, strict=True):
        table = step.block_tables[index][:count]
        rows.append(table + table[-1:] * (width - count))
    return rows
