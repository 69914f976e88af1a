"""The kernel of a CPU."""

from __future__ import annotations

from typing import ClassVar

from engine.attention.gather import GatherKernel
from engine.attention.kernel import CacheShape


class CpuKernel(GatherKernel):
    """What `GatherKernel` does, under the name that tells an operator where it runs."""

    name: ClassVar[str] = "cpu"

    @classmethod
    def unsupported(cls, shape: CacheShape) -> str | None:
        return None if shape.device.type == "cpu" else f"it runs on a CPU only, not on {shape.device.type}"
