"""Messages between the front end and an engine process, in msgpack.

The front end sends `Opening` until the engine is configured, and then `ToEngine`; the engine sends `FromEngine`.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from engine.config import EngineConfig
from engine.sampling_params import SamplingParams

EMBEDDINGS = "image_embeds"
"""Name of the tensor of an image that is sent as the encoder's output instead of as pixels."""

FinishReason = Literal["stop", "length", "abort", "error"]


class TensorData(msgspec.Struct, array_like=True):
    """An array in a message: numpy's dtype name, the shape, and the bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @classmethod
    def pack(cls, array: npt.NDArray[np.generic]) -> TensorData:
        array = np.ascontiguousarray(array)
        return cls(
            str(array.dtype), array.shape, memoryview(array.tobytes()) if not array.size else array.data.cast("B")
        )

    def unpack(self) -> npt.NDArray[np.generic]:
        """Return a writable array that owns its memory."""
        return np.frombuffer(bytearray(self.data), dtype=np.dtype(self.dtype)).reshape(self.shape)


class ImageInput(msgspec.Struct, array_like=True):
    """One image of a prompt, prepared for the family's encoder.

    Attributes:
        digest: Identifies the pixels and how they were prepared. It is the key of the encoder cache, and part of the
            hash of every key/value block that holds one of the image's tokens.
        offset: Index of the image's first token in the prompt.
        length: Number of the image's tokens.
        tensors: Arguments of the family's encoder, or only the encoder's output, [rows, D], named `EMBEDDINGS`.
        is_embed: Which of the `length` tokens take one of the encoder's output rows, in order; None means all. Some
            families put row ends and break tokens between the rows.
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
    """A question sent before the configuration, which may depend on the answer.

    The function belongs to the front end; the engine only lends it a process that has already imported torch
    and transformers.

    Attributes:
        function: "module:name" of a function from bytes to bytes.
        question: Its argument.
    """

    function: str
    question: bytes


Opening = Ask | EngineConfig
"""Messages before the model is loaded: any number of questions, then one configuration."""


class Add(msgspec.Struct, tag=True):
    """A new request: one prompt and one completion for each seed.

    Attributes:
        request_id: Id of the first completion; the others follow it. The front end chooses ids, unique per
            engine process.
        token_ids: The prompt.
        params: Sampling parameters. Prompt log probabilities come with the first completion only.
        seeds: One seed for each completion.
        eos_token_ids: Tokens that end a completion.
        images: Images of the prompt, in order.
        priority: Requests with lower values run first.
        grammar: What each completion must match (see `engine.guidance`); None for free text.
        positions: Positions of the prompt, int64; see `engine.families.preprocessor.Preprocessor.positions`.
        position_delta: See `engine.families.preprocessor.Preprocessor.positions`.
    """

    request_id: int
    token_ids: list[int]
    params: SamplingParams
    seeds: list[int]
    eos_token_ids: tuple[int, ...]
    images: list[ImageInput] = []
    priority: int = 0
    grammar: str | None = None
    positions: TensorData | None = None
    position_delta: int = 0

    @property
    def choice_ids(self) -> range:
        return range(self.request_id, self.request_id + len(self.seeds))


class Abort(msgspec.Struct, tag=True):
    """The front end no longer wants these completions."""

    request_ids: list[int]


class Ping(msgspec.Struct, tag=True):
    """A request for a `Pong`, answered between two steps: it shows that the main loop is running."""

    number: int


class Cores(msgspec.Struct, tag=True):
    """The part of a CPU's cores that the engine may use from now on; the rest is for other replicas."""

    share: float


ToEngine = Add | Abort | Ping | Cores


class Answer(msgspec.Struct, tag=True):
    """The answer to an `Ask`."""

    answer: bytes


class Ready(msgspec.Struct, tag=True):
    """The model is loaded and has completed a first request of its own.

    Attributes:
        max_model_len: Greatest number of tokens of a request.
        max_num_seqs: Greatest number of requests in a step.
        num_blocks: Number of key/value blocks.
        block_size: Tokens per block.
        dtype: Name of the type in which the model computes.
        attention: Name of the attention kernel.
        weight_bytes: Bytes of the weights of the first rank.
        constrains: Whether output can be constrained by grammars.
        device: Name of the accelerator, or "cpu".
        row_size: See `engine.families.base.FamilyModel`.
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


class Loaded(msgspec.Struct, tag=True):
    """The model is in memory; the engine warms up."""


class LoadFailed(msgspec.Struct, tag=True):
    """The model cannot be loaded; the engine process ends. faulty: whether its files are at fault."""

    message: str
    faulty: bool = False


class Logprobs(msgspec.Struct, array_like=True):
    """Log probabilities of the model at one position, before any logits processor.

    Entry 0 is the chosen token. The k best follow, best first; the chosen token is repeated there if it is
    among them. A rank is 1 plus the number of tokens that are strictly more probable.
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


class Output(msgspec.Struct, array_like=True):
    """What one step added to one completion.

    Attributes:
        request_id: Id of the completion.
        token_ids: New tokens.
        finish: Why the completion ended; None while it continues.
        logprobs: One entry for each new token, where the request asks for them.
        stop_token: The stop token that ended the completion; None if it was end-of-sequence.
        cached_tokens: Prompt tokens found in the prefix cache; sent with the first output.
        prompt_logprobs: Log probabilities of the prompt; sent with the first output.
        error: Message, where `finish` is "error".
        invalid: The request itself is at fault, and `error` may be shown to its client.
        queued: Seconds that the request waited for its first step.
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
    """Gauges with their current values, and counters since the process started."""

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
    draft_tokens: int = 0
    accepted_tokens: int = 0


class StepDone(msgspec.Struct, tag=True):
    """The outputs of one step, and the state of the engine after it."""

    outputs: list[Output]
    stats: Stats


class Pong(msgspec.Struct, tag=True):
    """The answer to a `Ping`."""

    number: int
    stats: Stats


FromEngine = Answer | Loaded | Ready | LoadFailed | StepDone | Pong
