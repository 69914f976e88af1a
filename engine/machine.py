"""What this machine can hold: its accelerators, or its host memory within the container's limit."""

from __future__ import annotations

from dataclasses import dataclass

from engine.memory import host_memory


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


def _accelerators() -> tuple[Device, ...]:
    try:
        import torch
    except ImportError:
        return ()
    if not torch.cuda.is_available():
        return ()
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(Device(properties.name, properties.total_memory) for properties in found)
