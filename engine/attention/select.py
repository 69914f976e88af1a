"""Chooses the attention kernel of a device."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from engine.attention.cpu import CpuKernel
from engine.attention.gather import GatherKernel
from engine.attention.kernel import AttentionKernel, CacheShape, PackedStep
from engine.attention.reference import ReferenceKernel
from engine.attention.varlen import VarlenKernel
from engine.attention.xformers_paged import XformersKernel
from engine.errors import ModelLoadError

logger = logging.getLogger(__name__)

KERNELS: dict[str, type[AttentionKernel]] = {
    kernel.name: kernel for kernel in (CpuKernel, GatherKernel, VarlenKernel, XformersKernel, ReferenceKernel)
}

AUTO: dict[str, tuple[type[AttentionKernel], ...]] = {
    "cpu": (CpuKernel,),
    "cuda": (VarlenKernel, XformersKernel, GatherKernel),
}
"""Kernels by device type, the best first; the last is plain torch and needs no trial."""

DEFAULT_BLOCK_SIZE = 16

TOLERANCE = 0.05
"""Greatest difference between a kernel's trial and the reference, for values around 1 and the rounding of
16-bit types."""


def choose_kernel(
    name: str, shape: CacheShape, block_size: int | None, *, query_heads: int
) -> tuple[type[AttentionKernel], CacheShape]:
    """Choose the kernel of that name, or with "auto" the best that works on the device.

    Args:
        name: Name of a kernel, or "auto".
        shape: Shape of the cache, without its block size.
        block_size: Tokens per block; None lets the kernel choose.
        query_heads: Query heads of this rank, for the trial.

    Returns:
        The kernel, and `shape` with its block size.

    Raises:
        ModelLoadError: The name is unknown, or the kernel does not work here.
    """
    if name != "auto" and name not in KERNELS:
        raise ModelLoadError(f"attention kernel {name!r} is unknown; known: auto, {', '.join(sorted(KERNELS))}")
    ranked = AUTO.get(shape.device.type, (GatherKernel,))
    passed_over: list[str] = []
    for kernel in ranked if name == "auto" else (KERNELS[name],):
        sized = replace(shape, block_size=block_size or max(DEFAULT_BLOCK_SIZE, kernel.block_multiple))
        problem = kernel.unsupported(sized)
        if problem is None and kernel is not ranked[-1]:
            problem = trial(kernel, sized, query_heads)
        if problem is None:
            why = "".join(f"; {reason}" for reason in passed_over)
            logger.info("attention kernel: %s, %d tokens a block%s", kernel.name, sized.block_size, why)
            return kernel, sized
        passed_over.append(f"not {kernel.name}: {problem}")
    raise ModelLoadError(f"no attention kernel: {'; '.join(passed_over)}")


@torch.inference_mode()
def trial(kernel: type[AttentionKernel], shape: CacheShape, query_heads: int) -> str | None:
    """Run two small steps and compare the kernel with the reference.

    What the installed FlashAttention and Triton support is not documented in a form that a program can query.

    Returns:
        Why the kernel cannot be used; None if it can.
    """
    size = shape.block_size
    small = replace(shape, num_layers=1, num_blocks=4)
    random = torch.Generator().manual_seed(0)
    tables = [[2, 0], [3, 1]]
    steps = [([0, size, size + 3], [size, 3], 0), ([0, 1, 4], [size + 1, 6], 1)]
    try:
        candidate, reference = kernel(small), ReferenceKernel(small)
        for starts, contexts, num_decodes in steps:
            places = [
                tables[i][place // size] * size + place % size
                for i, context in enumerate(contexts)
                for place in range(context - (starts[i + 1] - starts[i]), context)
            ]
            slots = torch.tensor(places, device=shape.device)
            step = PackedStep(starts, contexts, tables, slots, num_decodes, size)
            query, key, value = (
                torch.randn(starts[-1], heads, shape.head_dim, generator=random).to(shape.device, shape.dtype)
                for heads in (query_heads, shape.kv_heads, shape.kv_heads)
            )
            answers = []
            for each in (candidate, reference):
                each.begin(step)
                answers.append(each.attend(0, query, key, value, scale=shape.head_dim**-0.5).float())
            error = (answers[0] - answers[1]).abs().max().item()
            if not error <= TOLERANCE:
                return f"its answers are wrong here (by {error:.2g})"
    except Exception as error:  # whatever a foreign kernel raises, the next one is tried
        return f"it fails here ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    return None
