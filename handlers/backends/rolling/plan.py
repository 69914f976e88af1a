"""From the user's settings to the embedded engine's processes: devices, replicas, and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from engine.config import EngineConfig, LookupConfig, Vocabulary
from engine.machine import Machine, cpu_cache_bytes, host_memory, usable_cores
from handlers.backends.devices import chosen_devices, unused_on
from handlers.backends.estimate import cache_bytes_per_token
from handlers.backends.weights_read import WeightsRead
from handlers.errors import InvalidConfiguration
from properties.configuration import read_model_config
from properties.model import context_length
from properties.problem import ConfigurationError

if TYPE_CHECKING:
    from properties.problem import Problem
    from properties.settings import Settings

SMALL_MODEL = 1 << 30
"""Bytes of weight files up to which a CPU of several cores gets two replicas unless the user says otherwise. They
use the cores better than two threads of one replica: see docs/performance.md."""

PROCESS_BYTES = 1 << 29
"""What an engine's process takes beside weights and cache."""

_Drafted = Annotated[int, msgspec.Meta(ge=1, le=64)]


def plan_engines(
    settings: Settings,
    model_path: str,
    accelerators: int,
    vocabulary: Vocabulary | None = None,
    machine: Machine | None = None,
) -> list[EngineConfig]:
    """One config per replica. vocabulary: for constrained answers. machine: None for this one.

    With accelerators: as many replicas as the devices divided by tensor_parallel_degree, or max_workers where
    that is fewer. Without: max_workers or min_workers replicas of tensor_parallel_degree processes (`max` is 1); where
    neither is set, two of a small model if the machine has the cores and memory, else one.
    Raises InvalidConfiguration when there are too few devices, or for what this engine lacks: int8 on an
    accelerator, other kinds of speculative decoding.
    """
    numbers, problems = chosen_devices(settings, accelerators)
    if problems:
        raise InvalidConfiguration("; ".join(map(str, problems)))
    devices = [f"cuda:{number}" for number in numbers]
    degree = settings.tensor_parallel_degree
    if devices:
        ranks = len(devices) if degree == "max" else degree
        if ranks > len(devices):
            raise InvalidConfiguration(
                f"option.tensor_parallel_degree is {ranks}, but {len(devices)} devices are there; lower it or set max"
            )
        groups = [tuple(devices[at : at + ranks]) for at in range(0, len(devices) - ranks + 1, ranks)]
        groups = groups[: settings.max_workers or len(groups)]
    else:
        ranks = 1 if degree == "max" else degree
        workers = settings.max_workers or settings.min_workers
        if workers is None:
            workers = 2 if ranks == 1 and _two_fit(settings, Path(model_path), machine) else 1
        groups = [("cpu",) * ranks] * workers
    int8 = settings.quantize == "int8"
    if int8 and devices:
        raise InvalidConfiguration("option.quantize is int8, which the embedded engine has on a CPU only; leave it out")
    cache = settings.kv_cache_memory_mb
    encoder_cache = settings.encoder_cache_mb
    lookup = _lookup(settings.speculative_config)
    return [
        EngineConfig(
            model_path=model_path,
            dtype=settings.dtype,
            devices=group,
            max_model_len=settings.max_model_len,
            max_num_seqs=1 if settings.rolling_batch == "disable" else settings.max_rolling_batch_size,
            max_num_batched_tokens=settings.max_rolling_batch_prefill_tokens,
            max_step_seconds=settings.max_step_ms / 1000,
            block_size=settings.block_size,
            kv_cache_bytes=None if cache is None else cache << 20,
            cpu_share=1.0 / len(groups),
            gpu_memory_utilization=settings.gpu_memory_utilization,
            encoder_cache_bytes=None if encoder_cache is None else encoder_cache << 20,
            enable_prefix_caching=settings.enable_prefix_caching,
            pickled_weights=settings.load_format.lower() == "pt",
            int8=int8,
            enforce_eager=settings.enforce_eager,
            vocabulary=vocabulary,
            lookup=lookup,
        )
        for group in groups
    ]


def replicas_named(settings: Settings) -> bool:
    """Whether the user chose the number of replicas."""
    return settings.max_workers is not None or settings.min_workers is not None


def _two_fit(settings: Settings, directory: Path, machine: Machine | None) -> bool:
    """Whether this CPU serves the model better with two replicas.

    They take at most half of the memory, and the cache of each holds the longest request.
    """
    cores = 2 if machine is not None and machine.name is not None else usable_cores()
    if cores < 2 or settings.rolling_batch == "disable":
        return False
    memory = host_memory() if machine is None else machine.host.memory
    weights = WeightsRead(directory).total
    asked = settings.kv_cache_memory_mb
    half = cpu_cache_bytes(memory) // 2
    cache = half if asked is None else asked << 20
    fit = 0 < weights <= SMALL_MODEL and 2 * (weights + cache + PROCESS_BYTES) <= memory // 2
    return fit and (asked is not None or _longest_bytes(settings, directory) <= half)


def _longest_bytes(settings: Settings, directory: Path) -> int:
    """Return the bytes of cache that the longest request takes, at most; 0 where config.json does not say."""
    try:
        config = read_model_config(directory) or {}
    except ConfigurationError:
        return 0  # the engine will say what is wrong
    length = settings.max_model_len or context_length(config) or 0
    return length * (cache_bytes_per_token(config, "float32") or 0)


def unused_devices(settings: Settings, plan: Sequence[EngineConfig], accelerators: int) -> list[Problem]:
    """Return a warning for each option about devices that has no effect in this plan."""
    usable, _ = chosen_devices(settings, accelerators)
    return unused_on(settings, len(usable), len(plan), plan[0].tensor_parallel_degree, memory=True)


class _Ngram(msgspec.Struct, forbid_unknown_fields=True):
    """option.speculative_config for the embedded engine; the fields and their defaults are vLLM's."""

    method: Literal["ngram"]
    num_speculative_tokens: _Drafted
    prompt_lookup_min: _Drafted | None = None
    prompt_lookup_max: _Drafted | None = None


def _lookup(asked: Mapping[str, object] | None) -> LookupConfig | None:
    """Read option.speculative_config. Raises InvalidConfiguration."""
    if asked is None:
        return None
    try:
        ngram = msgspec.convert(asked, _Ngram)
    except msgspec.ValidationError as error:
        raise InvalidConfiguration(
            f"option.speculative_config: {error}; the embedded engine has the method ngram only, "
            f"with {', '.join(_Ngram.__struct_fields__[1:])}"
        ) from None
    longest = ngram.prompt_lookup_max or ngram.prompt_lookup_min or 5
    shortest = ngram.prompt_lookup_min or longest
    if shortest > longest:
        raise InvalidConfiguration(
            f"option.speculative_config: prompt_lookup_min is {shortest}, above prompt_lookup_max, {longest}"
        )
    return LookupConfig(ngram.num_speculative_tokens, shortest, longest)
