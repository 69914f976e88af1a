"""The words that the front and an engine process say to each other: msgpack, each preceded by its length.

One direction is `Opening`, until the engine is configured, and then `ToEngine`; the other is `FromEngine`. Nothing else
crosses the socket.
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from engine.config import EngineConfig
from engine.sampling_params import SamplingParams

FRAME = struct.Struct("<I")
"""The length prefix: four bytes, little endian."""

MAX_FRAME_BYTES = 1 << 30

EMBEDDINGS = "image_embeds"
"""The name under which a picture brings what the encoder would make of it."""

FinishReason = Literal["stop", "length", "abort", "error"]


class TensorData(msgspec.Struct, array_like=True):
    """An array on the wire: numpy's dtype name, shape and C-order bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @classmethod
    def pack(cls, array: npt.NDArray[np.generic]) -> TensorData:
        array = np.ascontiguousarray(array)
        return cls(
            str(array.dtype),
            array.shape,
            memoryview(array.tobytes()) if not array.size else array.data.cast("B"),
        )

    def unpack(self) -> npt.NDArray[np.generic]:
        """A writable array that owns its memory."""
        return np.frombuffer(bytearray(self.data), dtype=np.dtype(self.dtype)).reshape(self.shape)


class Picture(msgspec.Struct, array_like=True):
    """One picture of a prompt.

    digest: identifies the pixels *and* how they were prepared; it keys the encoder cache and enters the hash
        of every key/value block that holds one of the picture's tokens.
    offset, length: where its tokens stand in the prompt.
    is_embed: which of these `length` tokens take one of the encoder's output rows, in order; None means all
        (some families put row ends and break tokens between the rows).
    tensors: the arguments of the family's encoder; or its output itself, [rows, D], as `EMBEDDINGS` alone.
    """

    digest: bytes
    offset: int
    length: int
    tensors: dict[str, TensorData]
    is_embed: list[bool] | None = None

    @property
    def end(self) -> int:
        return self.offset + self.length


class Ask(msgspec.Struct, tag=True):
    """A question before the configuration, which may depend on the answer.

    function: "module:name", of bytes to bytes. It is the front's own; the engine lends it a process that has already
    imported torch and transformers.
    """

    function: str
    question: bytes


Opening = Ask | EngineConfig
"""What comes before the model is loaded: questions, and one configuration at their end."""


class Add(msgspec.Struct, tag=True):
    """A new request: one prompt and its answers, numbered `request_id`, `request_id + 1`, …, one for each seed.

    The ids are chosen by the front and unique per engine process. Prompt log probabilities come with the first
    answer alone. grammar: what each answer must match (see `engine.guidance`); None for free text.
    positions, position_delta: see `engine.families.base.Preprocessor.positions`; the array is of int64.
    """

    request_id: int
    token_ids: list[int]
    params: SamplingParams
    seeds: list[int]
    eos_token_ids: tuple[int, ...]
    pictures: list[Picture] = []
    priority: int = 0
    grammar: str | None = None
    positions: TensorData | None = None
    position_delta: int = 0

    @property
    def answer_ids(self) -> range:
        return range(self.request_id, self.request_id + len(self.seeds))


class Abort(msgspec.Struct, tag=True):
    request_ids: list[int]


class Ping(msgspec.Struct, tag=True):
    """Answered between two steps: proof that the loop turns."""

    number: int


class Shutdown(msgspec.Struct, tag=True):
    pass


ToEngine = Add | Abort | Ping | Shutdown


class Answer(msgspec.Struct, tag=True):
    answer: bytes


class Ready(msgspec.Struct, tag=True):
    """The model is loaded and has answered a first request of its own.

    constrains: grammars can be obeyed. device: the name of the accelerator, or "cpu". row_size: see
    `engine.families.base.FamilyModel`.
    """

    max_model_len: int
    max_num_seqs: int
    num_blocks: int
    block_size: int
    dtype: str
    attention: str
    weight_bytes: int
    constrains: bool = False
    device: str = "cpu"
    row_size: int = 0


class LoadFailed(msgspec.Struct, tag=True):
    message: str


class Logprobs(msgspec.Struct, array_like=True):
    """What the model thought at one position, before any processor.

    Entry 0 is the chosen token, then come the k best, best first; the chosen token is repeated there if it is
    among them. A rank is 1 + the number of tokens that are strictly more probable.
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


class Output(msgspec.Struct, array_like=True):
    """What one step gave one request.

    cached_tokens and prompt_logprobs come with the first output. `error` is set with finish "error".
    stop_token: the stop id that ended the answer, None for end-of-sequence.
    invalid: with an error, that the request itself is at fault and `error` may be shown to its client.
    queued: seconds that the request waited for its first step.
    """

    request_id: int
    token_ids: list[int]
    finish: FinishReason | None = None
    logprobs: list[Logprobs] | None = None
    stop_token: int | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[Logprobs] | None = None
    error: str | None = None
    invalid: bool = False
    queued: float = 0.0


class Stats(msgspec.Struct, array_like=True):
    """Gauges now, counters since the process started."""

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    encoder_queries: int = 0
    encoder_hits: int = 0
    preemptions: int = 0
    steps: int = 0


class StepDone(msgspec.Struct, tag=True):
    outputs: list[Output]
    stats: Stats


class Pong(msgspec.Struct, tag=True):
    number: int
    stats: Stats


FromEngine = Answer | Ready | LoadFailed | StepDone | Pong
