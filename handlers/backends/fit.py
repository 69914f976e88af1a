"""Whether a model fits the machine: its weights and key/value cache compared with each device's memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.attention.select import DEFAULT_BLOCK_SIZE
from engine.machine import Device, Machine, cpu_cache_bytes
from engine.memory import CPU_REQUESTS, CUDA_RESERVE, encoder_share
from handlers.backends.backend import Backend, Needs
from handlers.backends.estimate import cache_bytes_per_token, weights
from handlers.errors import InvalidConfiguration
from properties.configuration import Configuration
from properties.problem import Problem
from properties.settings import Settings


@dataclass
class Fit:
    """The estimate. Sizes in bytes; None where config.json and the files do not tell.

    Attributes:
        dtype: Of the weights.
        dtype_reason: Why this one.
        device: One of those that are there, or the host.
        replicas: How many are started.
        devices: How many accelerators are there for them; 0 on a CPU.
        image_bytes: Kept for each image of a running request, beside its tokens.
    """

    dtype: str
    dtype_reason: str
    device: Device
    replicas: int = 1
    devices_per_replica: int = 1
    devices: int = 0
    machines: int = 1
    weights: int | None = None
    weights_basis: str | None = None
    cache_bytes_per_token: int | None = None
    image_bytes: int | None = None
    cache_per_device: int | None = None
    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    @property
    def weights_per_device(self) -> int | None:
        return None if self.weights is None else -(-self.weights // self.devices_per_replica)

    @property
    def cache_tokens(self) -> int | None:
        """How many tokens the caches of one replica hold."""
        if self.cache_per_device is None or self.cache_bytes_per_token is None:
            return None
        return self.cache_per_device * self.devices_per_replica // self.cache_bytes_per_token

    def numbers(self) -> dict[str, Any]:
        """Return the numbers that `lmi check --json` prints."""
        return {
            "dtype": self.dtype,
            "dtype_reason": self.dtype_reason,
            "device": self.device.name,
            "device_memory": self.device.memory,
            "copies": self.replicas,
            "devices_per_copy": self.devices_per_replica,
            "devices_needed": self.replicas * self.devices_per_replica,
            "devices": self.devices,
            "machines": self.machines,
            "weights": self.weights,
            "weights_basis": self.weights_basis,
            "weights_per_device": self.weights_per_device,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "image_bytes": self.image_bytes,
            "cache_per_device": self.cache_per_device,
            "cache_tokens": self.cache_tokens,
        }


def fit(
    configuration: Configuration, backend: Backend, directory: Path, config: Mapping[str, Any], machine: Machine
) -> Fit:
    """Estimate what a model directory needs and compare it with the machine. Raises nothing."""
    device = min(machine.accelerators, key=lambda one: one.memory, default=machine.host)
    needs = backend.estimate(configuration, directory, config, machine)
    result = Fit(needs.dtype, needs.dtype_reason, device)
    result.errors += needs.errors
    result.warnings += needs.warnings
    result.image_bytes = needs.image_bytes
    result.cache_bytes_per_token = needs.token_bytes or cache_bytes_per_token(needs.shapes, needs.dtype)
    try:
        plan = backend.plan(configuration, directory, machine, needs.shapes)
    except InvalidConfiguration as error:
        result.devices = len(machine.accelerators)
        result.errors.append(Problem(error.message))
        return result
    result.replicas, result.devices_per_replica = plan.replicas, plan.per_replica
    result.devices, result.machines = plan.available, plan.machines
    result.warnings += plan.warnings
    try:
        counted = weights(directory, needs.shapes, needs.dtype)
    except (ValueError, OSError) as error:
        result.errors.append(Problem(f"the model's weights cannot be read: {error}", "model_id"))
        return result
    if counted is not None:
        result.weights, result.weights_basis = counted.size + needs.beside_weights, counted.basis
    if machine.accelerators:
        _fit_accelerator(result, configuration, needs, machine.name)
    else:
        _fit_host(result, configuration, needs, machine.name)
    if needs.encoder_cache:
        _compare_with_encoder_cache(result, configuration)
    _compare_with_cache(result, configuration, machine.name)
    return result


def _fit_accelerator(result: Fit, configuration: Configuration, needs: Needs, name: str | None) -> None:
    settings = configuration.settings
    usable = int(result.device.memory * settings.gpu_memory_utilization)
    held = result.weights_per_device or 0
    asked = settings.kv_cache_memory_mb
    reserve = CUDA_RESERVE + (needs.graphs if result.devices_per_replica == 1 else 0)
    cache = _useful(result, configuration, needs, max(usable - held - reserve, 0))
    if held > usable or (asked is not None and held + cache > usable):
        where = "each device" if name is None else f"each device of {name}"
        _too_large(result, held + (cache if asked is not None else 0), usable, where)


def _fit_host(result: Fit, configuration: Configuration, needs: Needs, name: str | None) -> None:
    memory = result.device.memory
    ranks = result.replicas * result.devices_per_replica
    room = cpu_cache_bytes(memory) // ranks
    cache = _useful(result, configuration, needs, room, requests=CPU_REQUESTS)
    held = (result.weights or 0) * result.replicas
    if held + cache * ranks > memory:
        _too_large(result, held + cache * ranks, memory, name or "the host")


def _useful(result: Fit, configuration: Configuration, needs: Needs, room: int, requests: int | None = None) -> int:
    """Set and return the number of cache bytes per device.

    That is the size that was asked for, or else as much of `room` as encoder outputs leave, and no more than `requests`
    of the longest requests fill. It is never more than a full batch could fill, unless the backend `takes_all`.
    """
    settings, length = configuration.settings, configuration.effective("max_model_len")
    asked = settings.kv_cache_memory_mb
    batch = settings.max_rolling_batch_size
    batch = min(batch, requests) if requests is not None and asked is None else batch
    if asked is not None:
        cache = asked * 2**20
    elif needs.encoder_cache:
        given, each = settings.encoder_cache_mb, (result.image_bytes or 0) // result.devices_per_replica
        given = None if given is None else given * 2**20
        cache = room - encoder_share(room, batch, each, given, on_cpu=result.devices == 0)
    else:
        cache = room
    if length is not None and result.cache_bytes_per_token is not None and (asked is None or not needs.takes_all):
        tokens = batch * _blocks(settings, length)
        fills = tokens * result.cache_bytes_per_token // result.devices_per_replica
        if asked is not None and fills < cache:
            text = (
                f"{configuration.assigned('kv_cache_memory_mb', asked)}: about {fills / 2**20:.0f} MiB are used, which "
                f"{batch} requests of {length} tokens fill (option.max_rolling_batch_size, option.max_model_len)"
            )
            result.warnings.append(Problem(text, "kv_cache_memory_mb"))
        cache = min(cache, fills)
    result.cache_per_device = cache
    return cache


def _blocks(settings: Settings, tokens: int) -> int:
    """Return the cache slots that a request of so many tokens takes, in whole blocks."""
    size = settings.block_size or DEFAULT_BLOCK_SIZE
    return -(-tokens // size) * size


def _too_large(result: Fit, needed: int, usable: int, where: str) -> None:
    result.errors.append(
        Problem(
            f"the model does not fit: {needed / 2**30:.2f} GiB are needed and {usable / 2**30:.2f} GiB are "
            f"usable on {where}; use more devices, a smaller dtype, a smaller option.kv_cache_memory_mb or a "
            "smaller model"
        )
    )


def _compare_with_cache(result: Fit, configuration: Configuration, name: str | None) -> None:
    settings, length, room = (configuration.settings, configuration.effective("max_model_len"), result.cache_tokens)
    if result.errors or length is None or room is None or room >= _blocks(settings, length):
        return
    if room < (settings.block_size or DEFAULT_BLOCK_SIZE):
        text = (
            f"the model does not fit: its weights leave {room} tokens of key/value cache on {name or 'this machine'}; "
            "use more devices, a smaller dtype or a smaller model"
        )
        result.errors.append(Problem(text))
        return
    text = (
        f"the key/value cache holds {room} tokens, fewer than one request of "
        f"{configuration.assigned('max_model_len', length)}"
    )
    if settings.max_model_len is None:
        result.warnings.append(Problem(f"{text}; it will be lowered", "max_model_len"))
    else:
        result.errors.append(Problem(f"{text}; lower it or enlarge the cache", "max_model_len"))


def _compare_with_encoder_cache(result: Fit, configuration: Configuration) -> None:
    """Check the encoder cache, which grows with the images that are sent.

    If it is too large, it ends a server that started well.
    """
    asked = configuration.settings.encoder_cache_mb
    if asked is None:
        return
    said, memory = configuration.assigned("encoder_cache_mb", asked), result.device.memory
    sharing = result.replicas * result.devices_per_replica if result.devices == 0 else 1
    if asked * 2**20 * sharing > memory:
        text = (
            f"{said} is more than the {memory / 2**30:.2f} GiB of {result.device.name}: memory runs out before the "
            "cache is full; lower it"
        )
        result.warnings.append(Problem(text, "encoder_cache_mb"))
    each = (result.image_bytes or 0) // result.devices_per_replica
    if asked * 2**20 < each:
        text = (
            f"{said} is less than the {math.ceil(each / 2**20)} MiB that one image of a running request takes: it is "
            "raised to that"
        )
        result.warnings.append(Problem(text, "encoder_cache_mb"))
