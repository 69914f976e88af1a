"""Linear layers on a CPU, with weights stored in the order in which oneDNN multiplies.

`torch.nn.functional.linear` reorders the weights in each call. For the few rows of a decode step this costs
as much as the product itself: with packed weights, 4 to 16 rows take 0.4 to 0.6 of the time on AVX512, and
about 0.8 in float32 on AVX2.
"""

from __future__ import annotations

import torch

from engine.machine import computes_bfloat16

ROWS = 16
"""Number of rows for which the weights are packed. oneDNN packs for 64 in the same way; for one row it packs
differently, which is slower from two rows on."""

SMALLEST = 1 << 18
"""Smallest number of weights in a layer for which packing pays: a call of a packed layer costs 10 us more."""

_DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(torch.nn.Linear):
    """A packed linear layer of a loaded model (see `pack`).

    It has no `weight`, and no part in the model's `state_dict`; the model can neither be copied nor loaded
    into.

    Attributes:
        weight_bytes: Bytes of the packed weights.
    """

    weight_bytes: int
    _packed: torch.Tensor

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [..., in_features] to [..., out_features]."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return out


def packable(weight: torch.Tensor) -> bool:
    """Tell whether a layer with these weights, [out_features, in_features], can be packed here, and whether it pays.

    In bfloat16 oneDNN needs AVX512BW, AVX-NE-CONVERT or similar, and raises RuntimeError on other CPUs.
    """
    if weight.dtype == torch.bfloat16 and not computes_bfloat16("cpu"):
        return False
    return weight.dtype in _DTYPES and weight.numel() >= SMALLEST


def pack(model: torch.nn.Module) -> None:
    """Pack the large linear layers of a model on a CPU, one after the other, to limit the memory for both forms.

    A layer stays the same object, because forward hooks may be attached to it (tensor parallelism uses some).
    A layer that shares its weights with the embedding has its own copy afterwards.
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
