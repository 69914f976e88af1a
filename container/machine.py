"""What this machine can hold: its accelerators, or its host memory within the container's limit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Device:
    """One accelerator, or the host itself. memory: bytes in all."""

    name: str
    memory: int


@dataclass(frozen=True)
class Machine:
    """accelerators: empty on a CPU. host: the host memory that this process may use."""

    accelerators: tuple[Device, ...]
    host: Device


def this_machine() -> Machine:
    """Look at the machine; imports torch where it is installed, to count accelerators."""
    return Machine(_accelerators(), Device("host memory", host_memory()))


def host_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes: physical memory, or the control group's limit (version 2 or 1) where that is lower."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in _CGROUP_LIMITS:
        try:
            limit = (cgroup / name).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def _accelerators() -> tuple[Device, ...]:
    try:
        import torch
    except ImportError:
        return ()
    if not torch.cuda.is_available():
        return ()
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(Device(properties.name, properties.total_memory) for properties in found)
