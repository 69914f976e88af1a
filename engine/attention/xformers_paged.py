"""One-token queries with xformers' paged split-k Triton kernel; everything else as in `GatherKernel`."""

from __future__ import annotations

import os
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from engine.attention.gather import GatherKernel, padded_tables
from engine.attention.kernel import CacheShape, PackedStep, StaticStep

HEAD_DIMS = (16, 32, 64, 128, 256, 512)


class XformersKernel(GatherKernel):
    """Reads the blocks in place instead of gathering a copy of them.

    The Triton kernel needs queries of equal length and supports neither a paged sliding window nor a score
    cap, so chunks, and layers where these matter, are gathered. On a CPU it runs in Triton's interpreter
    (`TRITON_INTERPRET=1`), for tests.
    """

    name: ClassVar[str] = "xformers"
    block_multiple: ClassVar[int] = 64
    capturable: ClassVar[bool] = True

    _bias: Any = None

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape)
        self._static: dict[int, Any] = {}

    @classmethod
    def unsupported(cls, shape: CacheShape) -> str | None:
        if shape.device.type != "cuda" and not _interpreted():
            return f"it runs on CUDA only, not on {shape.device.type}"
        try:
            _xformers()
        except ImportError as error:
            return f"xformers cannot be imported ({error})"
        if shape.head_dim not in HEAD_DIMS:
            return f"head size {shape.head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
        if shape.device.type == "cuda":
            if shape.dtype not in (torch.bfloat16, torch.float16):
                return f"it supports bfloat16 and float16 only, not {str(shape.dtype).removeprefix('torch.')}"
            if torch.cuda.get_device_capability(shape.device) < (8, 0):
                return "its Triton kernel needs compute capability 8.0"
        return super().unsupported(shape)

    def begin(self, step: PackedStep) -> None:
        super().begin(step)
        count = step.num_decodes
        self._bias = None
        if count:
            tables = torch.tensor(padded_tables(step, list(range(count))), dtype=torch.int32)
            self._longest = max(step.context_lens[:count])
            tables = tables.to(self.shape.device, non_blocking=True)
            self._bias = self._describe(step.context_lens[:count], tables)

    def begin_static(self, step: StaticStep) -> None:
        """Describe the step by an object that was made when so many rows were first seen, before a graph is captured.

        Of the lengths in it the kernel reads the tensor on the device alone.
        """
        super().begin_static(step)
        rows, width = step.block_tables.shape
        if rows not in self._static:
            self._static[rows] = self._describe([1] * rows, step.block_tables)
        self._bias, self._longest = self._static[rows], width * self.shape.block_size
        self._bias.block_tables, self._bias.k_seqinfo.seqlen = step.block_tables, step.context_lens

    def _describe(self, context_lens: list[int], tables: torch.Tensor) -> Any:
        return _xformers().bias.from_seqlens(
            q_seqlen=[1] * len(context_lens),
            kv_seqlen=context_lens,
            block_tables=tables,
            page_size=self.shape.block_size,
            device=self.shape.device,
        )

    def _attend_decodes(
        self,
        layer: int,
        query: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        if softcap is not None or (window is not None and window < self._longest):
            return super()._attend_decodes(layer, query, scale, window, softcap)
        ops = _xformers()
        count, heads, dim = query.shape
        kv_heads = self.shape.kv_heads
        shared = heads // kv_heads
        keys, values = (
            slots.transpose(0, 1)[None, :, :, None].expand(-1, -1, -1, shared, -1) for slots in self._layers[layer][2:]
        )
        inputs = ops.inputs(
            query=query.reshape(1, count, kv_heads, shared, dim),
            key=keys,
            value=values,
            attn_bias=self._bias,
            scale=scale,
        )
        out: torch.Tensor = ops.kernel.apply(inputs, needs_gradient=False)[0]
        return out.reshape(count, heads, dim)


@cache
def _xformers() -> SimpleNamespace:
    """Import what is used of xformers, an optional dependency.

    Raises:
        ImportError: xformers or Triton is missing.
    """
    if _interpreted():
        os.environ.setdefault("XFORMERS_ENABLE_TRITON", "1")
    import triton  # noqa: F401  # without it xformers would fail only later
    from xformers.ops.fmha.attn_bias import PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
    from xformers.ops.fmha.common import Inputs
    from xformers.ops.fmha.triton_splitk import FwOp

    return SimpleNamespace(
        bias=PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
        inputs=Inputs,
        kernel=FwOp,
    )


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
