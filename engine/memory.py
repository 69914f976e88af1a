"""Sizes the key/value cache and the encoder cache, and derives how long a request may be."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from engine.attention.kernel import CacheShape
from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.machine import cpu_cache_bytes, host_memory

logger = logging.getLogger(__name__)

DEFAULT_MODEL_LEN = 4096
"""Used where config.json names no length."""

CPU_REQUESTS = 16
"""On a CPU the cache takes no more than what this many requests of the greatest length fill."""

ENCODER_CACHE = 256 << 20
CPU_ENCODER_CACHE = 32 << 20
"""Bytes for encoder outputs where the configuration names none.

The CPU's value is lower because images and the key/value cache compete for the same memory.
"""

CUDA_RESERVE = 1 << 30
"""Bytes left free for activations beside the cache on an accelerator."""

GRAPHS_RESERVE = 1 << 30
"""Bytes left free for CUDA graphs, where there are any; no more are captured when they take this much."""


def cache_blocks(
    config: EngineConfig, shape: CacheShape, text: PretrainedConfig, image_bytes: int = 0, *, graphs: bool = False
) -> tuple[int, int]:
    """Compute the longest request and the number of key/value blocks.

    Args:
        config: Settings of the engine.
        shape: Shape of the cache; its `num_blocks` is ignored.
        text: Configuration of the language model.
        image_bytes: Bytes of each image of a running request, as for `encoder_budget`.
        graphs: Whether there are CUDA graphs, whose padding takes a block.

    Returns:
        `max_model_len` in tokens, and the number of blocks for requests.

    Raises:
        ModelLoadError: A length that was asked for does not fit.
    """
    declared = int(getattr(text, "max_position_embeddings", None) or DEFAULT_MODEL_LEN)
    if config.max_model_len is not None and config.max_model_len > declared:
        raise ModelLoadError(
            f"max_model_len {config.max_model_len} is more than the model's own {declared} positions; lower it"
        )
    wanted = config.max_model_len or declared
    by_itself = shape.device.type == "cpu" and config.kv_cache_bytes is None
    requests = min(config.max_num_seqs, CPU_REQUESTS) if by_itself else config.max_num_seqs
    if config.kv_cache_bytes is not None:
        budget = config.kv_cache_bytes
    else:
        budget = _default_budget(config, shape.device, graphs=graphs)
        budget -= encoder_share(
            budget, requests, image_bytes, config.encoder_cache_bytes, on_cpu=shape.device.type == "cpu"
        )
    affordable = budget // shape.bytes_per_block - graphs
    useful = requests * -(-wanted // shape.block_size)
    num_blocks = min(affordable, useful)
    if config.kv_cache_bytes is not None and useful < affordable:
        logger.warning(
            "the key/value cache uses %d of the %d MiB of kv_cache_memory_mb: %d requests of %d tokens fill no more",
            useful * shape.bytes_per_block >> 20, budget >> 20, requests, wanted,
        )  # fmt: skip
    capacity = num_blocks * shape.block_size
    if num_blocks < 1 or (config.max_model_len is not None and capacity < config.max_model_len):
        raise ModelLoadError(
            f"the key/value cache of {budget >> 20} MiB holds {max(capacity, 0)} tokens, fewer than one request of "
            f"max_model_len {wanted}; lower max_model_len or give the cache more memory "
            "(kv_cache_memory_mb, gpu_memory_utilization)"
        )
    if capacity < wanted:
        logger.warning("max_model_len lowered from %d to %d: the key/value cache holds no more", wanted, capacity)
    return min(wanted, capacity), num_blocks


def encoder_budget(config: EngineConfig, device: torch.device, image_bytes: int, *, graphs: bool = False) -> int:
    """Return the bytes for encoder outputs.

    Args:
        config: Settings of the engine.
        device: Device that holds them beside the key/value cache.
        image_bytes: Bytes of each image of a running request, for models whose tokens attend to images; else 0.
        graphs: Whether there are CUDA graphs.
    """
    given = config.encoder_cache_bytes
    cuda = device.type == "cuda"
    total = torch.cuda.mem_get_info(device)[1] if cuda else int(host_memory() * config.cpu_share)
    if given is not None and given * (1 if cuda else config.tensor_parallel_degree) > total:
        logger.warning(
            "encoder_cache_mb = %d is more than the memory of %d MiB, which runs out before the cache is full",
            given >> 20, total >> 20,
        )  # fmt: skip
    if given is not None and given < image_bytes:
        logger.warning(
            "encoder_cache_mb = %d is less than the %d MiB that one image of a running request takes: it is raised to "
            "that",
            given >> 20, -(-image_bytes >> 20),
        )  # fmt: skip
    usual = given if given is not None else ENCODER_CACHE if cuda else CPU_ENCODER_CACHE
    if not image_bytes or given is not None or config.kv_cache_bytes is not None:
        return max(usual, image_bytes)
    requests = config.max_num_seqs if cuda else min(config.max_num_seqs, CPU_REQUESTS)
    budget = _default_budget(config, device, graphs=graphs)
    return max(usual, encoder_share(budget, requests, image_bytes, given, on_cpu=not cuda))


def encoder_share(budget: int, requests: int, image_bytes: int, given: int | None, *, on_cpu: bool) -> int:
    """Return how many bytes of a budget encoder outputs take from the key/value cache.

    Without a size that was asked for they fit beside the budget, but for images of running requests: those take up to
    half of it, and at least one has a place. A size that was asked for fits beside it on a CPU alone, where the budget
    is a part of the memory.

    Args:
        budget: Bytes for both caches.
        requests: Greatest number of requests.
        image_bytes: Bytes of each image of a running request.
        given: The size that was asked for.
        on_cpu: Whether the caches are in a CPU's memory.
    """
    if given is None:
        share = max(image_bytes, min(budget // 2, requests * image_bytes))
    else:
        share = 0 if on_cpu else max(given, image_bytes)
    return min(budget, share)


def _default_budget(config: EngineConfig, device: torch.device, *, graphs: bool) -> int:
    """Return the smallest budget of all ranks, because their caches must have the same size."""
    budget = max(0, _own_budget(config, device) - (GRAPHS_RESERVE if graphs else 0))
    if config.tensor_parallel_degree > 1:
        least = torch.tensor(budget, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        budget = int(least)
    return budget


def _own_budget(config: EngineConfig, device: torch.device) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(free - total * (1 - config.gpu_memory_utilization)) - CUDA_RESERVE)
    return int(cpu_cache_bytes(host_memory()) * config.cpu_share / config.tensor_parallel_degree)
