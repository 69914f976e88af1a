"""One step's work as plain data: what the scheduler decided, in the form that every rank is told it."""

from __future__ import annotations

import msgspec

from engine.messages import Picture, TensorData
from engine.scheduler import Chunk


class PicturePlace(msgspec.Struct, array_like=True):
    """Where a picture's tokens stand in its prompt (see `Picture`), without its pixels."""

    digest: bytes
    offset: int
    length: int
    is_embed: list[bool] | None

    @property
    def end(self) -> int:
        return self.offset + self.length


class ChunkInput(msgspec.Struct, array_like=True):
    """The tokens [start, start + len(token_ids)) of one sequence.

    samples: the logits of the last token are wanted. prompt_logits: those of all its tokens are.
    pictures: those that the chunk needs. spans: runs of the sequence that have a token in the chunk and are seen both
        ways.
    positions, position_delta: see `Sequence.positions_within`. is_long: see `Sequence`.
    """

    token_ids: list[int]
    start: int
    block_table: list[int]
    samples: bool
    prompt_logits: bool
    pictures: list[PicturePlace]
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
        sequence, start, stop = chunk.sequence, chunk.start, chunk.stop
        positions = sequence.positions_within(start, stop)
        return cls(
            token_ids=sequence.token_ids[start:stop],
            start=start,
            block_table=sequence.block_table,
            samples=stop == sequence.num_tokens,
            prompt_logits=sequence.prompt_logprobs is not None and start < sequence.num_prompt_tokens,
            pictures=[
                PicturePlace(p.digest, p.offset, p.length, p.is_embed)
                for p in sequence.pictures_for(start, stop)
            ]
            if sequence.pictures
            else [],
            spans=sequence.spans_within(start, stop) if sequence.spans else [],
            position_delta=sequence.position_delta,
            positions=None if positions is None else TensorData.pack(positions),
            is_long=sequence.is_long,
        )


class Encode(msgspec.Struct, tag=True):
    pictures: list[Picture]


class Run(msgspec.Struct, tag=True):
    chunks: list[ChunkInput]


class Trim(msgspec.Struct, tag=True):
    keep: list[bytes]


class Scrub(msgspec.Struct, tag=True):
    blocks: list[int]


Command = Encode | Run | Trim | Scrub
"""What a rank can be told. All ranks are told the same, in the same order, so their caches stay alike."""
