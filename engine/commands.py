"""Commands to a rank, as plain data. All ranks execute the same ones in the same order, so their caches are equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from engine.messages import ImageInput, TensorData

if TYPE_CHECKING:
    from engine.scheduler import Chunk


class ImagePlace(msgspec.Struct, array_like=True):
    """Position of an image's tokens in its prompt (see `ImageInput`), without its pixels."""

    digest: bytes
    offset: int
    length: int
    is_embed: list[bool] | None

    @property
    def end(self) -> int:
        return self.offset + self.length


class ChunkInput(msgspec.Struct, array_like=True):
    """A `Chunk` as plain data, in the form in which every rank receives it: the tokens [start, start + len(token_ids)).

    Drafted tokens are tokens like any other.

    Attributes:
        token_ids: The tokens.
        start: Index of the first token in its sequence.
        block_table: Blocks of the sequence.
        samples: For how many tokens, counted from the last one, the logits are needed.
        prompt_logits: Whether the logits of all tokens are needed.
        images: Images that the chunk needs.
        spans: Spans of the sequence with bidirectional attention that have a token in the chunk.
        position_delta: See `Sequence.positions_within`.
        positions: See `Sequence.positions_within`.
        is_long: See `Sequence`.
    """

    token_ids: list[int]
    start: int
    block_table: list[int]
    samples: int
    prompt_logits: bool
    images: list[ImagePlace]
    spans: list[tuple[int, int]] = []
    position_delta: int = 0
    positions: TensorData | None = None
    is_long: bool = False

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)

    @classmethod
    def of(cls, chunk: Chunk) -> ChunkInput:
        sequence, start, stop = chunk.sequence, chunk.start, chunk.stop + len(chunk.drafts)
        positions = sequence.positions_within(start, stop)
        return cls(
            token_ids=sequence.token_ids[start : chunk.stop] + chunk.drafts,
            start=start,
            block_table=sequence.block_table,
            samples=1 + len(chunk.drafts) if chunk.samples else 0,
            prompt_logits=sequence.prompt_logprobs is not None and start < sequence.num_prompt_tokens,
            images=[ImagePlace(p.digest, p.offset, p.length, p.is_embed) for p in sequence.images_for(start, stop)]
            if sequence.images
            else [],
            spans=sequence.spans_within(start, stop) if sequence.spans else [],
            position_delta=sequence.position_delta,
            positions=None if positions is None else TensorData.pack(positions),
            is_long=sequence.is_long,
        )


class Encode(msgspec.Struct, tag=True):
    """Encode these images, and keep the outputs."""

    images: list[ImageInput]


class Run(msgspec.Struct, tag=True):
    """Compute these chunks."""

    chunks: list[ChunkInput]


class Trim(msgspec.Struct, tag=True):
    """Bring the encoder cache back within its budget, but keep these digests."""

    keep: list[bytes]


class Scrub(msgspec.Struct, tag=True):
    """Zero these blocks."""

    blocks: list[int]


Command = Encode | Run | Trim | Scrub
