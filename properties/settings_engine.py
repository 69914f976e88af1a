"""Options of the rolling batch, the key/value cache and the devices."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from properties.field import VLLM, Level, Variable, option
from properties.values import TRUE, Amount, Degree, Fraction, JsonObject, Length, Positive, Tokens, Word


def _cuda_graphs(text: str) -> str:
    return "false" if text.lower() in TRUE else "true"


class EngineSettings(BaseModel):
    """Rolling batch, memory and devices"""

    rolling_batch: Literal["auto", "vllm", "rolling", "disable"] = option(
        "Backend: vllm, rolling (the embedded engine), auto (vLLM where it is installed, sees an accelerator "
        "and serves the model, else the embedded engine), disable (the embedded engine, request by request; what LMI "
        "means by it where async_mode or entry_point ask for vLLM's asynchronous engine: auto).",
        default="auto",
        replaced=(
            ("lmi-dist", "vllm"),
            ("scheduler", "auto"),
            ("trtllm", "auto"),
            ("tensorrtllm", "auto"),
            ("deepspeed", "auto"),
            ("tnx", "auto"),
        ),
    )
    async_mode: bool = option(
        "LMI's switch to vLLM's asynchronous engine: with true, rolling_batch=disable means auto. Requests are batched "
        "either way.",
        default=False,
    )
    tensor_parallel_degree: Degree = option(
        "Devices that share one copy of the model; max: all of them, divided by pipeline_parallel_degree; with vLLM as "
        "many of these as the model's attention heads can be shared by.",
        default="max",
        aliases=("tensor_parallel_size",),
        variables=(Variable("TENSOR_PARALLEL_DEGREE"), Variable("SM_NUM_GPUS", Level.TGI)),
    )
    pipeline_parallel_degree: Positive = option(
        "Groups of layers, each on its own devices.",
        default=1,
        backends=VLLM,
        aliases=("pipeline_parallel_size",),
        variables=(Variable("PIPELINE_PARALLEL_DEGREE"),),
    )
    data_parallel_degree: Positive | None = option(
        "Copies of the model inside vLLM. Default: devices divided by the other degrees, at most max_workers; "
        "max_workers, min_workers or 1 without accelerators; 1 on several machines.",
        default=None,
        backends=VLLM,
        aliases=("data_parallel_size",),
    )
    max_rolling_batch_size: Positive = option(
        "Most requests that generate at the same time; the others wait in the queue.",
        default=256,
        aliases=("max_num_seqs",),
        variables=(Variable("MAX_BATCH_SIZE", Level.TGI),),
    )
    max_rolling_batch_prefill_tokens: Tokens = option(
        "Most tokens, of prompts and answers together, in one step. Default: chosen by the backend.",
        default=None,
        unit="tokens",
        aliases=("max_num_batched_tokens",),
        variables=(Variable("MAX_BATCH_PREFILL_TOKENS", Level.TGI),),
    )
    max_model_len: Length = option(
        "Longest prompt and answer together. Default: what the model's config.json says.",
        default=None,
        unit="tokens",
        variables=(Variable("MAX_TOTAL_TOKENS", Level.TGI),),
    )
    gpu_memory_utilization: Fraction = option(
        "Part of each accelerator's memory that weights and key/value cache may fill.",
        default=0.9,
        variables=(Variable("CUDA_MEMORY_FRACTION", Level.TGI),),
    )
    kv_cache_memory_mb: Positive | None = option(
        "Key/value cache per device. Default: computed from the memory that is free.",
        default=None,
        unit="MiB",
    )
    block_size: Positive | None = option(
        "Tokens per block of the key/value cache. Default: chosen by the backend.",
        default=None,
        unit="tokens",
    )
    kv_cache_dtype: Word = option(
        "Type of the key/value cache, e.g. auto, fp8.", default="auto", backends=VLLM
    )
    enable_prefix_caching: bool = option(
        "Reuse the key/value cache of a prompt's beginning that was seen before.", default=True
    )
    enable_chunked_prefill: bool = option(
        "Cut long prompts over several steps. The embedded engine always does.", default=True, backends=VLLM
    )
    enforce_eager: bool = option(
        "No graph capture and no compilation: quicker start, slower steps.",
        default=False,
        backends=VLLM,
        variables=(Variable("ENABLE_CUDA_GRAPHS", Level.TGI, _cuda_graphs),),
    )
    cpu_offload_gb_per_gpu: Amount = option(
        "Weights kept in host memory, per accelerator.",
        default=0,
        backends=VLLM,
        unit="GiB",
        aliases=("cpu_offload_gb",),
    )
    speculative_config: JsonObject | None = option(
        "Speculative decoding, as vLLM's speculative_config.", default=None, backends=VLLM
    )
    kv_transfer_config: JsonObject | None = option(
        "Key/value cache transfer, as vLLM's kv_transfer_config.", default=None, backends=VLLM
    )
