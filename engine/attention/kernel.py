"""What an attention kernel is, and what it must know about a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The size of one device's paged key/value cache, all layers together."""

    num_layers: int
    num_blocks: int
    block_size: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_block(self) -> int:
        """Keys and values of all layers."""
        per_token = 2 * self.num_layers * self.kv_heads * self.head_dim * self.dtype.itemsize
        return per_token * self.block_size


@dataclass(slots=True)
class PackedStep:
    """The tokens of all sequences of a step, packed into one row, one-token queries first.

    Sequence i owns the query tokens [query_starts[i], query_starts[i + 1]) and sees context_lens[i] tokens, its
    own new ones included; their keys and values lie in the blocks block_tables[i].

    slots [tokens]: where each packed token's key and value are written (block * block_size + place in it).
    num_decodes: how many leading sequences have exactly one query token.
    """

    query_starts: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]
    slots: torch.Tensor
    num_decodes: int
    block_size: int

    @property
    def num_sequences(self) -> int:
        return len(self.context_lens)

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]

    def query_length(self, index: int) -> int:
        return self.query_starts[index + 1] - self.query_starts[index]


class AttentionKernel(ABC):
    """Owns the paged cache in the layout that it likes, writes each step's keys and values, attends over them.

    One step is `begin(step)`, then `attend` once per layer. A query sees the positions up to its own, and no
    further back than `window` of them where a window is given.

    block_multiple: the cache's block size must be a multiple of this.
    """

    name: ClassVar[str]
    block_multiple: ClassVar[int] = 1

    def __init__(self, shape: CacheShape) -> None:
        self.shape = shape

    @classmethod
    def unsupported(cls, shape: CacheShape) -> str | None:
        """Why this kernel cannot serve such a cache here; None where it can."""
        if shape.block_size % cls.block_multiple:
            return f"its block size must be a multiple of {cls.block_multiple}, not {shape.block_size}"
        return None

    @abstractmethod
    def begin(self, step: PackedStep) -> None:
        """Do the work that all layers share (index tensors, groups)."""

    @abstractmethod
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
        """query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim] of the begun step, in
        packed order -> [tokens, heads, head_dim]."""

    @abstractmethod
    def scrub(self, blocks: list[int]) -> None:
        """Zero the blocks: what a request with NaN left there must not reach the next owner's padding."""
