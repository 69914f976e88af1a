"""Paged attention with torch's own FlashAttention: one `varlen_attn` call per layer for the whole packed row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.attention import current_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn

from engine.attention.gather import padded_tables
from engine.attention.kernel import CacheShape, PackedStep, StaticKernel, StaticStep

MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class _Index:
    """Arguments of `varlen_attn` for a step, on the device."""

    slots: torch.Tensor
    query_starts: torch.Tensor
    key_starts: torch.Tensor | None
    context_lens: torch.Tensor
    block_table: torch.Tensor
    max_query: int
    max_context: int


class VarlenKernel(StaticKernel):
    """Cache layout: [layers, blocks, block_size, kv_heads, head_dim], as FlashAttention's paged mode needs it.

    FlashAttention 2 (included in torch) requires pages whose size is a multiple of 256 and head sizes that
    are multiples of 8 up to 256; see `mha_varlen_fwd` in torch's `flash_attn/flash_api.cpp`.
    """

    name: ClassVar[str] = "varlen"
    block_multiple: ClassVar[int] = 256
    special: ClassVar[bool] = False
    capturable: ClassVar[bool] = True
    capturable_windows: ClassVar[bool] = True

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape)
        size = (shape.num_layers, shape.num_blocks, shape.block_size, shape.kv_heads, shape.head_dim)
        self._keys = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        self._values = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        self._index: _Index | None = None

    @classmethod
    def unsupported(cls, shape: CacheShape) -> str | None:
        if shape.device.type != "cuda":
            return f"it runs on CUDA only, not on {shape.device.type}"
        if shape.dtype not in (torch.bfloat16, torch.float16):
            return f"it supports bfloat16 and float16 only, not {str(shape.dtype).removeprefix('torch.')}"
        if torch.cuda.get_device_capability(shape.device) < (8, 0):
            return "FlashAttention needs compute capability 8.0"
        if shape.head_dim % 8 or shape.head_dim > MAX_HEAD_DIM:
            return f"head size {shape.head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}"
        return super().unsupported(shape)

    def begin(self, step: PackedStep) -> None:
        """Send all index tensors to the device in one copy, without waiting for it."""
        count = step.num_sequences
        tables = padded_tables(step, list(range(count)))
        key_starts = [0]
        for context in step.context_lens:
            key_starts.append(key_starts[-1] + context)
        flat = [*step.query_starts, *key_starts, *step.context_lens]
        for table in tables:
            flat += table
        host = torch.tensor(flat, dtype=torch.int32, pin_memory=self.shape.device.type == "cuda")
        index = host.to(self.shape.device, non_blocking=True)
        self._index = _Index(
            slots=step.slots,
            query_starts=index[: count + 1],
            key_starts=index[count + 1 : 2 * count + 2] if _needs_key_starts() else None,
            context_lens=index[2 * count + 2 : 3 * count + 2],
            block_table=index[3 * count + 2 :].view(count, -1),
            max_query=max(step.query_length(i) for i in range(count)),
            max_context=max(step.context_lens),
        )

    def begin_static(self, step: StaticStep) -> None:
        rows, width = step.block_tables.shape
        starts = torch.nn.functional.pad(step.context_lens.cumsum(0, dtype=torch.int32), (1, 0))
        self._index = _Index(
            slots=step.slots,
            query_starts=torch.arange(rows + 1, dtype=torch.int32, device=self.shape.device),
            key_starts=starts if _needs_key_starts() else None,
            context_lens=step.context_lens,
            block_table=step.block_tables,
            max_query=1,
            max_context=width * self.shape.block_size,
        )

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
        index = self._index
        assert index is not None, "begin() was not called"
        assert softcap is None
        keys, values = self._keys[layer], self._values[layer]
        keys.flatten(0, 1).index_copy_(0, index.slots, key)
        values.flatten(0, 1).index_copy_(0, index.slots, value)
        out = varlen_attn(
            query.contiguous(),
            keys,
            values,
            index.query_starts,
            index.key_starts,
            index.max_query,
            index.max_context,
            scale=scale,
            window_size=_window_size(window, index),
            enable_gqa=query.shape[1] != key.shape[1],
            seqused_k=index.context_lens,
            block_table=index.block_table,
        )
        assert isinstance(out, torch.Tensor)
        return out

    def scrub(self, blocks: list[int]) -> None:
        index = torch.tensor(blocks, device=self.shape.device)
        self._keys[:, index] = 0
        self._values[:, index] = 0


def _needs_key_starts() -> bool:
    """Whether FlashAttention wants the keys' starts: 2 does, although pages make them meaningless; 3 rejects them."""
    return current_flash_attention_impl() is None


def _window_size(window: int | None, index: _Index) -> tuple[int, int]:
    """How far a query looks left and right of itself; -1 means no limit.

    FlashAttention aligns a sequence's last query with its last key. If every query is the last one, there
    is nothing to its right; saying so lets FlashAttention pack the query heads that share a key head.
    """
    right = -1 if index.max_query == 1 else 0
    if window is None or window >= index.max_context:
        return -1, right
    return window - 1, right
