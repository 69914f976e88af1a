"""Linear layers on a CPU, with weights stored in the order in which oneDNN multiplies.

`torch.nn.functional.linear` brings the weights into that order anew in each call. For the few rows of a decode step
this costs as much as the product itself: packed once, 4 to 16 rows take 0.4 to 0.6 of the time on AVX512, and about
0.8 in float32 on AVX2.
"""

from __future__ import annotations

import torch

from engine.machine import computes_bfloat16

ROWS = 16
"""The number of rows that the weights are packed for; oneDNN packs for 64 the same way, and for one row differently,
which is slower from two rows on."""

SMALLEST = 1 << 18
"""Weights in a layer for which packing pays: a call of a packed layer itself costs 10 us more."""

_DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(torch.nn.Linear):
    """A linear layer of a model that is loaded already: see `pack`. Its `weight` is gone, and with it its part of the
    model's `state_dict`; the model can be neither copied nor loaded into.

    weight_bytes: what the packed weights take.
    """

    weight_bytes: int
    _packed: torch.Tensor

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [..., in_features] -> [..., out_features]."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return out


def packable(weight: torch.Tensor) -> bool:
    """Whether a layer with these weights, [out_features, in_features], can be packed here and is worth it.

    In bfloat16 oneDNN needs AVX512BW, AVX-NE-CONVERT or the like, and raises RuntimeError on other CPUs.
    """
    if weight.dtype == torch.bfloat16 and not computes_bfloat16("cpu"):
        return False
    return weight.dtype in _DTYPES and weight.numel() >= SMALLEST


def pack(model: torch.nn.Module) -> None:
    """Pack the large linear layers of a model on a CPU, one after the other, so that few are held twice at a time.

    A layer stays the same object, since forward hooks may hang on it (tensor parallelism has some). One that shares its
    weights with the embedding has a copy of its own afterwards.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for layer in model.modules():
        if type(layer) is torch.nn.Linear and packable(layer.weight):
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)
            weight_bytes = layer.weight.nbytes
            del layer.weight
            layer.__class__ = PackedLinear
            assert isinstance(layer, PackedLinear)
            layer._packed, layer.weight_bytes = packed, weight_bytes
