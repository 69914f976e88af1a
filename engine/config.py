"""Configuration of an engine process: plain data that can be sent to a spawned process."""

from __future__ import annotations

from typing import Literal

import msgspec

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


class Vocabulary(msgspec.Struct, frozen=True):
    """What the engine must know about tokens to constrain its output.

    Attributes:
        tokenizer: The fast tokenizer as JSON text.
        tokens: Number of tokens of the tokenizer, added tokens included.
        size: Number of columns of the logits.
        eos_token_ids: Tokens that end a completion.
        forbidden: Tokens that are never chosen under a grammar, such as image placeholders.
    """

    tokenizer: str
    tokens: int
    size: int
    eos_token_ids: tuple[int, ...] = ()
    forbidden: tuple[int, ...] = ()


class LookupConfig(msgspec.Struct, frozen=True):
    """Speculative decoding by prompt lookup (see `engine.prompt_lookup`).

    Attributes:
        tokens: Greatest number of tokens drafted for a sequence in a step; at least 1.
        shortest: Fewest tokens at the end of the sequence that must occur before; at least 1.
        longest: Most tokens that are compared; at least `shortest`.
    """

    tokens: int
    shortest: int
    longest: int


class EngineConfig(msgspec.Struct, kw_only=True, frozen=True, tag=True):
    """Settings of one engine: one replica, which is one device or one tensor-parallel group.

    Attributes:
        model_path: Local directory in the hub's format.
        dtype: "auto" follows config.json, and falls back to float32 where the device is slow in that type.
        devices: One torch device string ("cpu", "cuda:0") for each tensor-parallel rank.
        max_model_len: Greatest number of tokens of prompt and completion together; None follows config.json.
        max_num_seqs: Greatest number of requests in a step.
        max_num_batched_tokens: Token budget of one step; None chooses by device.
        max_step_seconds: How long decodes may wait for the prompts of others (see `StepTime`); None for any time.
        block_size: Tokens per key/value block; None lets the attention kernel choose.
        kv_cache_bytes: Bytes for keys and values per device; None chooses by device.
        cpu_share: Part of a CPU's memory and cores that this engine may use (1 / replicas).
        gpu_memory_utilization: Part of an accelerator's memory that this engine may use.
        encoder_cache_bytes: Bytes for vision-encoder outputs per device; None chooses by device and model.
        enable_prefix_caching: Whether requests share the blocks of a common prefix.
        pickled_weights: Whether PyTorch's own files, which are pickles, may be read where there are no safetensors.
            Code in them is never executed.
        threads: Intra-op threads per process on a CPU; None chooses from the cores and the number of processes.
        int8: Whether the decoder computes with weights and rows of 8 bits, which changes its answers. CPU only.
        enforce_eager: Whether decode steps run without CUDA graphs.
        attention: Name of the attention kernel, or "auto".
        vocabulary: Needed to constrain output by grammars; None where no request may ask for it.
        lookup: Speculative decoding; None for one token at a step.
    """

    model_path: str
    dtype: DtypeName = "auto"
    devices: tuple[str, ...] = ("cpu",)
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    max_step_seconds: float | None = None
    block_size: int | None = None
    kv_cache_bytes: int | None = None
    cpu_share: float = 1.0
    gpu_memory_utilization: float = 0.9
    encoder_cache_bytes: int | None = None
    enable_prefix_caching: bool = True
    pickled_weights: bool = False
    threads: int | None = None
    int8: bool = False
    enforce_eager: bool = False
    attention: str = "auto"
    vocabulary: Vocabulary | None = None
    lookup: LookupConfig | None = None

    @property
    def tensor_parallel_degree(self) -> int:
        return len(self.devices)
