"""What an engine process needs to know before it starts; plain data, so that it travels to a spawned process."""

from __future__ import annotations

from typing import Literal

import msgspec

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


class Vocabulary(msgspec.Struct, frozen=True):
    """What constrained answers must know of the tokens.

    tokenizer: the fast tokenizer as JSON text. tokens: how many it has, added ones included.
    size: columns of the logits. eos_token_ids: what ends an answer.
    forbidden: never chosen under a grammar, as pictures' placeholders are not.
    """

    tokenizer: str
    tokens: int
    size: int
    eos_token_ids: tuple[int, ...] = ()
    forbidden: tuple[int, ...] = ()


class EngineConfig(msgspec.Struct, kw_only=True, frozen=True, tag=True):
    """Settings of one engine (one replica, which is one device or one tensor-parallel group).

    model_path: a local directory in the hub's format.
    dtype: "auto" follows config.json, and falls back to float32 where the device is slow in that type.
    device: a torch device string ("cpu", "cuda:0"); with tensor parallelism rank r uses `devices[r]`.
    max_model_len: tokens of prompt and answer together; None follows config.json.
    max_num_seqs: requests that share a step at most.
    max_num_batched_tokens: the token budget of one step; None chooses by device.
    block_size: tokens per key/value block; None lets the attention kernel choose.
    kv_cache_bytes: memory for keys and values per device; None chooses by device.
    cpu_share: the part of a CPU's memory and cores that this engine may count on (1 / replicas).
    encoder_cache_bytes: memory for vision-encoder outputs per device; None chooses by device and model.
    threads: intra-op threads per process on a CPU; None chooses from the cores and the number of processes.
    attention: the kernel by name, or "auto".
    pickled_weights: whether PyTorch's own files, which are pickles, may be read where there are no safetensors; what is
    in them is never run.
    vocabulary: for answers that must match a grammar; None where there are none.
    """

    model_path: str
    dtype: DtypeName = "auto"
    devices: tuple[str, ...] = ("cpu",)
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    kv_cache_bytes: int | None = None
    cpu_share: float = 1.0
    gpu_memory_utilization: float = 0.9
    encoder_cache_bytes: int | None = None
    enable_prefix_caching: bool = True
    pickled_weights: bool = False
    threads: int | None = None
    attention: str = "auto"
    vocabulary: Vocabulary | None = None

    @property
    def tensor_parallel_degree(self) -> int:
        return len(self.devices)
