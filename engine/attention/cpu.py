"""Paged attention on a CPU: decodes in compiled code (`engine/native`), chunks as `GatherKernel` computes them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import ClassVar

import numpy as np
import torch

from engine.attention.gather import DecodeGroup, GatherKernel
from engine.attention.kernel import CacheShape, PackedStep
from engine.native.library import Cache, Decodes, compiled

_DTYPES = (torch.float32, torch.bfloat16)

_LARGEST_HEAD = 1024
"""Greatest size of a head: a thread keeps 64 floats for each of its elements on its stack."""


@contextmanager
def _one_of_two_threads() -> Iterator[None]:
    """Use one thread of torch where there are two: to wake the other takes longer than it saves."""
    threads = torch.get_num_threads()
    if threads == 2:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads == 2:
            torch.set_num_threads(threads)


class CpuKernel(GatherKernel):
    """`GatherKernel` with its cache in huge pages, where the system has them for who asks.

    A request's blocks lie anywhere in the cache, and finding their pages takes a third of a gather's time otherwise.
    """

    name: ClassVar[str] = "cpu"

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape)
        self._library = compiled() if shape.dtype in _DTYPES and shape.head_dim <= _LARGEST_HEAD else None
        self._caches = [
            Cache(
                keys.data_ptr(),
                values.data_ptr(),
                keys.stride(0),
                shape.kv_heads,
                shape.head_dim,
                shape.block_size,
                shape.dtype == torch.bfloat16,
            )
            for keys, values in zip(self._keys, self._values, strict=True)
        ]

    def _zeros(self, size: tuple[int, ...]) -> torch.Tensor:
        length = math.prod(size) * self.shape.dtype.itemsize
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # not on this system, or not in this kernel
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=self.shape.dtype).view(size)

    def _group_decodes(self, step: PackedStep) -> list[DecodeGroup]:
        """Keep all decodes together: compiled code reads no padding."""
        count, size = step.num_decodes, step.block_size
        if self._library is None or count == 0:
            return super()._group_decodes(step)
        contexts = step.context_lens[:count]
        used = [-(-context // size) for context in contexts]
        tables = np.zeros((count, max(used)), dtype=np.int64)
        for row, table, number in zip(tables, step.block_tables, used, strict=False):
            row[:number] = table[:number]
        blocks, lengths = torch.from_numpy(tables).flatten(), torch.tensor(contexts)
        return [DecodeGroup(None, blocks, lengths, min(contexts), max(contexts), max(used), {})]

    def _decode(
        self,
        layer: int,
        group: DecodeGroup,
        query: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        count, heads, dim = query.shape
        if self._library is None:
            with _one_of_two_threads():
                return super()._decode(layer, group, query, scale, window, softcap)
        if query.stride()[1:] != (dim, 1):
            query = query.contiguous()
        blocks, contexts = group.blocks.long(), torch.as_tensor(group.contexts, dtype=torch.long)
        out = query.new_empty(count, heads, dim)
        self._library.attend_decodes(
            self._caches[layer],
            Decodes(blocks.data_ptr(), contexts.data_ptr(), count, group.width),
            query.data_ptr(),
            query.stride(0),
            heads,
            out.data_ptr(),
            scale,
            window or 0,
            softcap or 0.0,
            torch.get_num_threads(),
        )
        return out

    @classmethod
    def unsupported(cls, shape: CacheShape) -> str | None:
        return None if shape.device.type == "cpu" else f"it runs on a CPU only, not on {shape.device.type}"
