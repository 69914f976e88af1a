"""Resources of this machine within the container's limits: accelerators, host memory and processor cores."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""From glibc's malloc.h."""

_KEPT_BYTES = 256 << 20

_MEMORY_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Device:
    """An accelerator, or the host itself.

    Attributes:
        name: Name given by the manufacturer, or "host memory".
        memory: Total memory in bytes.
    """

    name: str
    memory: int


@dataclass(frozen=True)
class Machine:
    """Memory of a machine.

    Attributes:
        accelerators: The accelerators; empty where the model runs on a CPU.
        host: Host memory that this process may use.
        name: Name for people; None for the machine that this process runs on.
        bfloat16: Whether a model computes in bfloat16 at full speed there; None where this machine is to be asked.
    """

    accelerators: tuple[Device, ...]
    host: Device
    name: str | None = None
    bfloat16: bool | None = None

    def computes_bfloat16(self) -> bool:
        """Tell whether a model computes in bfloat16 at full speed there. Imports torch to ask this machine."""
        if self.bfloat16 is not None:
            return self.bfloat16
        return computes_bfloat16("cuda" if self.accelerators else "cpu")


def this_machine() -> Machine:
    """Inspect the machine. Imports torch, where it is installed, to count accelerators."""
    return Machine(_accelerators(), Device("host memory", host_memory()))


def computes_bfloat16(device_type: str) -> bool:
    """Tell whether this machine's "cpu" or "cuda" device computes in bfloat16 at full speed.

    An accelerator that is not present on this machine is assumed to do so.
    """
    import torch

    if device_type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def device_name(device: str) -> str:
    """Return the manufacturer's name of a torch device; "cpu" stays "cpu"."""
    if device == "cpu":
        return device
    import torch

    return str(torch.cuda.get_device_name(device))


def host_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the physical memory in bytes, or the control group's limit (version 2 or 1) where it is lower."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in _MEMORY_LIMITS:
        try:
            limit = (cgroup / name).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def cpu_cache_bytes(memory: int) -> int:
    """Return the bytes that all key/value caches on a CPU take: a quarter of the memory, and at most 4 GiB.

    Everything else on the machine shares that memory. memory: bytes of the host.
    """
    return min(4 << 30, memory // 4)


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Count the cores of the affinity mask, or fewer where the control group's quota (version 2 or 1) allows fewer.

    A container with two processors on a machine with 64 sees all 64, and is throttled if it uses them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return cores if quota is None else max(1, min(cores, int(quota)))


def keep_freed_memory() -> None:
    """Keep up to 256 MiB of freed memory for the next step: new pages take a tenth of the time of a prompt's step.

    An operator who has set the allocator's thresholds by its own variables keeps them.
    """
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return
    with suppress(AttributeError):  # only glibc has it
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)


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
    """Return the quota in cores, or None where there is no limit."""
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
