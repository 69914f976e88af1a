"""The interface of an attention kernel, and its input for a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Shape of one device's paged key/value cache, for all layers.

    Attributes:
        num_layers: Layers with a cache.
        num_blocks: Number of blocks.
        block_size: Tokens per block.
        kv_heads: Heads of keys and values on this device.
        head_dim: Size of a head.
        dtype: Type of keys and values.
        device: Device of the cache.
        special: Whether the model has spans with bidirectional attention, or caps attention scores.
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
        """Bytes of a block's keys and values in all layers."""
        per_token = 2 * self.num_layers * self.kv_heads * self.head_dim * self.dtype.itemsize
        return per_token * self.block_size


@dataclass(slots=True)
class PackedStep:
    """The tokens of all sequences of a step, packed into one row, sequences with one token first.

    Attributes:
        query_starts: Sequence i owns the query tokens [query_starts[i], query_starts[i + 1]).
        context_lens: Number of tokens that each sequence attends to, its new ones included.
        block_tables: Blocks of each sequence, which hold its keys and values.
        slots: [tokens]: where the key and value of each packed token are written (block * block_size +
            offset).
        num_decodes: Number of leading sequences with exactly one query token.
        block_size: Tokens per block.
        spans: For each sequence, runs [start, stop) of positions with bidirectional attention; a run that has
            query tokens lies within the context. Empty if no sequence has any.
        spans_pass_windows: Whether a sliding window hides nothing within a run.
    """

    query_starts: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]
    slots: torch.Tensor
    num_decodes: int
    block_size: int
    spans: Sequence[Sequence[tuple[int, int]]] = ()
    spans_pass_windows: bool = False

    def hidden(
        self, index: int, window: int | None, device: torch.device, queries: slice = slice(None)
    ) -> torch.Tensor:
        """Return a mask [query tokens, context] of what the queries of sequence `index` may not see.

        `queries` selects some of them.
        """
        context = self.context_lens[index]
        position = torch.arange(context - self.query_length(index), context, device=device)[queries, None]
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


@dataclass(frozen=True, slots=True)
class StaticStep:
    """One token of each of several sequences, described by tensors on the device alone (see `DecodeGraphs`).

    Attributes:
        slots: [rows]: where the key and value of each token are written, as in `PackedStep`.
        context_lens: [rows], int32: number of tokens that each attends to, itself included.
        block_tables: [rows, width], int32. What is behind a sequence's last block is any block without NaN.
    """

    slots: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor


class AttentionKernel(ABC):
    """Owns the paged cache in its own layout, writes each step's keys and values, and attends over them.

    A step is `begin(step)`, followed by `attend` once per layer. A query sees the positions up to its own
    (only the last `window` of them if a window is given), and the rest of a span that contains it (see
    `PackedStep.spans`).

    Attributes:
        name: Name in the configuration and the log.
        block_multiple: The cache's block size must be a multiple of this.
        special: Whether the kernel supports models with `CacheShape.special`.
        capturable: Whether CUDA graphs of decode steps pay: it is a `StaticKernel`, and reads no more of the cache than
            the sequences hold, although tables are as wide as for the longest.
        capturable_windows: Whether that holds for layers with windows or score caps, too.
    """

    name: ClassVar[str]
    block_multiple: ClassVar[int] = 1
    special: ClassVar[bool] = True
    capturable: ClassVar[bool] = False
    capturable_windows: ClassVar[bool] = False

    def __init__(self, shape: CacheShape) -> None:
        self.shape = shape

    @classmethod
    def unsupported(cls, shape: CacheShape) -> str | None:
        """Return why this kernel cannot serve such a cache here; None if it can."""
        if shape.special and not cls.special:
            return "it supports neither bidirectional spans nor score caps, and the model has them"
        if shape.block_size % cls.block_multiple:
            return f"its block size must be a multiple of {cls.block_multiple}, not {shape.block_size}"
        return None

    @abstractmethod
    def begin(self, step: PackedStep) -> None:
        """Do the work shared by all layers, such as building index tensors."""

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
        """Write the keys and values of a layer, and compute its attention.

        Args:
            layer: Index of the layer.
            query: [tokens, heads, head_dim] of the current step, in packed order.
            key: [tokens, kv_heads, head_dim].
            value: [tokens, kv_heads, head_dim].
            scale: Factor for the scores.
            window: Length of the sliding window in tokens; None without one.
            softcap: If given, scores become softcap * tanh(score / softcap).

        Returns:
            [tokens, heads, head_dim].
        """

    @abstractmethod
    def scrub(self, blocks: list[int]) -> None:
        """Zero the blocks, so that NaN left there by a request does not reach the padding of the next owner."""


class StaticKernel(AttentionKernel):
    """A kernel that also computes static steps."""

    @abstractmethod
    def begin_static(self, step: StaticStep) -> None:
        """Do what `begin` does, without reading the values of the step's tensors on the CPU."""
