"""What this machine can hold: its accelerators, or its host memory within the container's limit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_MEMORY_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")


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


def computes_bfloat16(device_type: str) -> bool:
    """Whether this machine's "cpu" or "cuda" computes in bfloat16 at full speed; an accelerator that is not on this
    machine is taken to."""
    import torch

    if device_type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def device_name(device: str) -> str:
    """What the maker calls a device of torch's; "cpu" is called just that."""
    if device == "cpu":
        return device
    import torch

    return str(torch.cuda.get_device_name(device))


def host_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes: physical memory, or the control group's limit (version 2 or 1) where that is lower."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in _MEMORY_LIMITS:
        try:
            limit = (cgroup / name).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores of the affinity mask, or fewer where the control group's quota (version 2 or 1) allows fewer:
    a container with two processors on a machine of 64 sees all 64, and is throttled if it uses them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return cores if quota is None else max(1, min(cores, int(quota)))


def _accelerators() -> tuple[Device, ...]:
    try:
        import torch
    except ImportError:
        return ()
    if not torch.cuda.is_available():
        return ()
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(Device(properties.name, properties.total_memory) for properties in found)


def _quota(cgroup: Path) -> float | None:
    """Cores' worth of time per period; None for no limit."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not limit.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return int(limit) / int(period)
