"""What an attention kernel is, and what it must know about a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The size of one device's paged key/value cache, all layers together.

    special: the model has spans that are seen both ways, or caps attention scores.
    """

    num_layers: int
    num_blocks: int
    block_size: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    special: bool = False

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
    spans: for each sequence, runs [start, stop) of its positions whose tokens see each other both ways; a run that has
        query tokens lies within the context. Empty where no sequence has any.
    spans_pass_windows: within a run a sliding window hides nothing.
    """

    query_starts: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]
    slots: torch.Tensor
    num_decodes: int
    block_size: int
    spans: Sequence[Sequence[tuple[int, int]]] = ()
    spans_pass_windows: bool = False

    def hidden(self, index: int, window: int | None, device: torch.device) -> torch.Tensor:
        """[query tokens, context] of booleans: what sequence `index`'s queries may not see."""
        context = self.context_lens[index]
        position = torch.arange(context - self.query_length(index), context, device=device)[:, None]
        key = torch.arange(context, device=device)[None, :]
        hidden = key > position
        spans = self.spans[index] if self.spans else ()
        for start, stop in () if self.spans_pass_windows else spans:
            hidden &= (position < start) | (position >= stop) | (key >= stop)
        if window is not None:
            hidden |= key <= position - window
        for start, stop in spans if self.spans_pass_windows else ():
            hidden &= (position < start) | (position >= stop) | (key < start) | (key >= stop)
        return hidden

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
    further back than `window` of them where a window is given; and the rest of a span that it lies in (see
    `PackedStep.spans`). softcap: scores become softcap * tanh(score / softcap).

    block_multiple: the cache's block size must be a multiple of this. special: see `CacheShape`.
    """

    name: ClassVar[str]
    block_multiple: ClassVar[int] = 1
    special: ClassVar[bool] = True

    def __init__(self, shape: CacheShape) -> None:
        self.shape = shape

    @classmethod
    def unsupported(cls, shape: CacheShape) -> str | None:
        """Why this kernel cannot serve such a cache here; None where it can."""
        if shape.special and not cls.special:
            return "it knows no spans that are seen both ways and no score caps, which the model has"
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
        softcap: float | None = None,
    ) -> torch.Tensor:
        """query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim] of the begun step, in
        packed order -> [tokens, heads, head_dim]."""

    @abstractmethod
    def scrub(self, blocks: list[int]) -> None:
        """Zero the blocks: what a request with NaN left there must not reach the next owner's padding."""
