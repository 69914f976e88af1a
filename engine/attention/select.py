"""Which attention kernel runs on which device."""

from __future__ import annotations

from dataclasses import replace

from engine.attention.cpu import CpuKernel
from engine.attention.kernel import AttentionKernel, CacheShape
from engine.attention.reference import ReferenceKernel
from engine.errors import ModelLoadError

KERNELS: dict[str, type[AttentionKernel]] = {"cpu": CpuKernel, "reference": ReferenceKernel}


def make_kernel(name: str, shape: CacheShape, num_blocks: int) -> AttentionKernel:
    """The kernel of that name, or for "auto" the device's fastest, with a cache of `num_blocks` blocks."""
    if name == "auto":
        name = "cpu" if shape.device.type == "cpu" else "reference"
    if name not in KERNELS:
        raise ModelLoadError(f"attention kernel {name!r} is unknown; known: {', '.join(sorted(KERNELS))}")
    return KERNELS[name](replace(shape, num_blocks=num_blocks))
