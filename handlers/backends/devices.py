"""Which devices the options choose, and which options about devices have no effect on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from properties.names import key_of
from properties.problem import Problem

if TYPE_CHECKING:
    from properties.settings import Settings


def chosen_devices(settings: Settings, accelerators: int) -> tuple[list[int], list[Problem]]:
    """Return the numbers of the accelerators to use, and a problem for each number that is not there.

    accelerators: how many there are; without any, option.load_on_devices has no effect.
    """
    wanted = settings.load_on_devices
    if wanted == "*" or accelerators == 0:
        return list(range(accelerators)), []
    problems = [
        Problem(f"load_on_devices names {number}, but the devices are 0 to {accelerators - 1}", "load_on_devices")
        for number in wanted
        if number >= accelerators
    ]
    return [number for number in wanted if number < accelerators], problems


def unused_on(
    settings: Settings, accelerators: int, replicas: int, per_replica: int, *, memory: bool = False
) -> list[Problem]:
    """Return a warning for each option that was set and has no effect on this machine.

    Args:
        settings: The options.
        accelerators: How many may be used.
        replicas: How many are started, each on `per_replica` devices.
        per_replica: See `replicas`.
        memory: Whether option.gpu_memory_utilization and option.enforce_eager have an effect on accelerators only.
    """
    problems = []

    def ignored(name: str, reason: str) -> None:
        if name in settings.model_fields_set:
            text = f"{key_of(name)} = {getattr(settings, name)} has no effect: {reason}"
            problems.append(Problem(text, name))

    if accelerators == 0:
        if settings.load_on_devices != "*":
            ignored("load_on_devices", "no accelerator is visible")
        if memory:
            ignored("gpu_memory_utilization", "no accelerator is visible; see option.kv_cache_memory_mb")
            ignored("enforce_eager", "no accelerator is visible, and CUDA graphs are for those")
        return problems
    if settings.max_workers is None:
        ignored("min_workers", "on accelerators max_workers counts")
    elif replicas < settings.max_workers:
        text = f"only {replicas} are started, each on {per_replica} of {accelerators} devices"
        problems.append(Problem(f"max_workers = {settings.max_workers}: {text}", "max_workers"))
    idle = accelerators - replicas * per_replica
    limited = settings.max_workers == replicas or settings.data_parallel_degree is not None
    if idle > 0 and not limited and settings.tensor_parallel_degree != "max":
        problems.append(
            Problem(
                f"{idle} of {accelerators} devices are not used: each replica takes {per_replica}; see "
                "option.tensor_parallel_degree",
                "tensor_parallel_degree",
            )
        )
    return problems
