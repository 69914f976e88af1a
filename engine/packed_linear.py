"""Linear layers on a CPU, with weights stored in the order in which oneDNN multiplies.

`torch.nn.functional.linear` reorders the weights in each call. For the few rows of a decode step this costs
as much as the product itself: with packed weights, 4 to 16 rows take 0.4 to 0.6 of the time on AVX512, and
about 0.8 in float32 on AVX2. Float32 weights that are as exact in float16, as those stored in bfloat16 nearly always
are, are kept in it and multiplied in float32 (FBGEMM), which reads half the memory. In bfloat16 our own code multiplies
few rows, where the processor has the instructions (`engine/native/products.c`). Where it is asked for, the weights of a
decoder become integers of 8 bits, at the price of other answers (`quantize`); our own code multiplies few rows.
"""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from typing import Any

import torch

from engine.machine import computes_bfloat16
from engine.native.library import compiled, multiplies

ROWS = 16
"""Number of rows for which the weights are packed. oneDNN packs for 64 in the same way; for one row it packs
differently, which is slower from two rows on."""

SMALLEST = 1 << 18
"""Smallest number of weights in a layer for which packing pays: a call of a packed layer costs 10 us more."""

FEW_ROWS = 64
"""Greatest number of rows that `products.c` multiplies: oneDNN takes 1.4 times as long for 16, and 1.1 times for 64."""

BLOCK = 64
"""Number of columns that oneDNN and `products.c` store together."""

_DTYPES = (torch.float32, torch.bfloat16)

_ROUNDING = 2.0**-24
"""Greatest relative error of a weight in float32. What float16 loses of a matrix must be less than that of its norm."""


class PackedLinear(torch.nn.Linear):
    """A packed linear layer of a loaded model (see `pack`).

    It has no `weight`, and no part in the model's `state_dict`; the model can neither be copied nor loaded
    into.

    Attributes:
        weight_bytes: Bytes of the packed weights.
    """

    weight_bytes: int
    _packed: Any

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [..., in_features] to [..., out_features]."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return out


class FewRows(PackedLinear):
    """A packed linear layer that multiplies few rows by compiled code, which reads oneDNN's own weights.

    What a row becomes does not depend on the number of rows, above which oneDNN multiplies them.
    """

    _columns: int
    _inner: int
    _address: int

    def read(self, shape: torch.Size) -> None:
        """Read the packed weights, of this shape before they were packed, in oneDNN's memory."""
        self._columns, self._inner = shape
        self._address = torch.ops.mkldnn.data_ptr(self._packed)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [..., in_features] to [..., out_features]."""
        count = rows.numel() // self._inner
        if count > FEW_ROWS:
            return super().forward(rows)
        library = compiled()
        assert library is not None
        out = rows.new_empty(*rows.shape[:-1], self._columns)
        self._multiply(library, rows.contiguous(), count, out)
        return out

    @abstractmethod
    def _multiply(self, library: ctypes.CDLL, rows: torch.Tensor, count: int, out: torch.Tensor) -> None:
        """Multiply so many rows, which are contiguous."""


class FewRowsLinear(FewRows):
    """`FewRows` in bfloat16. It adds in oneDNN's order.

    Attributes:
        part: How many products oneDNN adds up at a time, which it chooses by the size of the layer.
    """

    part: int

    def find_part(self) -> int:
        """Set `part` and return it.

        If no number gives oneDNN's results, those of few rows are rounded as well, but some differ in the last bit.
        """
        rows = torch.randn(FEW_ROWS, self._inner, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        with torch.inference_mode():
            expected = PackedLinear.forward(self, rows)
            for part in (512, 1024, 256, 2048, -(-self._inner // 512) * 512):
                self.part = part
                if torch.equal(self(rows), expected):
                    break
        return self.part

    def _multiply(self, library: ctypes.CDLL, rows: torch.Tensor, count: int, out: torch.Tensor) -> None:
        library.multiply_bfloat16(
            rows.data_ptr(),
            count,
            self._inner,
            self._address,
            None if self.bias is None else self.bias.data_ptr(),
            out.data_ptr(),
            self._columns,
            self.part,
            torch.get_num_threads(),
        )


class HalfLinear(PackedLinear):
    """A packed linear layer in float32, with weights in float16."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [..., in_features] to [..., out_features]."""
        out: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(rows, self._packed)
        return out


class Int8Linear(PackedLinear):
    """A packed linear layer whose weights and rows are rounded to 8 bits, each row of either with its own scale.

    What a row becomes does not depend on the rows beside it.
    """

    _scales: torch.Tensor
    _zeros: torch.Tensor

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [..., in_features] to [..., out_features]."""
        flat = rows.reshape(-1, rows.shape[-1])  # not in_features, which tensor parallelism leaves as it was
        scale = _scales(flat, 127)
        # The processor multiplies unsigned by signed numbers: 128 stands for 0.
        rounded = (flat / scale).round_().add_(128).to(torch.uint8)
        out = _int8_product(rounded, self._packed, self._scales, self._zeros).mul_(scale)
        if self.bias is not None:
            out += self.bias
        return out.to(rows.dtype).view(*rows.shape[:-1], out.shape[-1])


class FewRowsInt8Linear(FewRows, Int8Linear):
    """`FewRows` in 8 bits."""

    def _multiply(self, library: ctypes.CDLL, rows: torch.Tensor, count: int, out: torch.Tensor) -> None:
        rounded = rows.new_empty(count, self._inner, dtype=torch.uint8)
        scales = rows.new_empty(count, dtype=torch.float32)
        bfloat16 = rows.dtype == torch.bfloat16
        library.round_rows(rows.data_ptr(), count, self._inner, bfloat16, rounded.data_ptr(), scales.data_ptr())
        library.multiply_int8(
            rounded.data_ptr(),
            scales.data_ptr(),
            count,
            self._inner,
            self._address,
            self._scales.data_ptr(),
            self._address + self.weight_bytes,
            None if self.bias is None else self.bias.data_ptr(),
            out.data_ptr(),
            self._columns,
            bfloat16,
            torch.get_num_threads(),
        )


def packable(weight: torch.Tensor) -> bool:
    """Tell whether a layer with these weights, [out_features, in_features], can be packed here, and whether it pays.

    In bfloat16 oneDNN needs AVX512BW, AVX-NE-CONVERT or similar, and raises RuntimeError on other CPUs.
    """
    if weight.dtype == torch.bfloat16 and not computes_bfloat16("cpu"):
        return False
    return weight.dtype in _DTYPES and weight.numel() >= SMALLEST


def exact_in_half(weight: torch.Tensor) -> bool:
    """Tell whether float16 holds float32 weights as well as float32 arithmetic needs them.

    Weights stored in bfloat16 are exact from 2**-17 on; smaller ones lose at most 2**-25.
    """
    parts = ((part, part.half().float().sub_(part)) for part in torch.split(weight, 4096))
    norms = [(part.norm().square(), lost.norm().square()) for part, lost in parts]
    whole, lost = (torch.stack(each).sum().sqrt() for each in zip(*norms, strict=True))
    return bool(lost <= _ROUNDING * whole)


def pack(model: torch.nn.Module) -> None:
    """Pack the large linear layers of a model on a CPU, one after the other, to limit the memory for both forms.

    A layer stays the same object, because forward hooks may be attached to it (tensor parallelism uses some).
    A layer that shares its weights with the embedding has its own copy afterwards.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    parts: dict[torch.Size, int] = {}
    fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    for layer in model.modules():
        if type(layer) is not torch.nn.Linear or not packable(layer.weight):
            continue
        weight, bias = layer.weight.detach(), layer.bias
        half = fbgemm and weight.dtype == torch.float32 and exact_in_half(weight)
        if half:
            packed = torch.ops.quantized.linear_prepack_fp16(weight, None if bias is None else bias.detach())
        else:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        del layer.weight
        layer.__class__ = HalfLinear if half else PackedLinear
        assert isinstance(layer, PackedLinear)
        layer._packed, layer.weight_bytes = packed, weight.nbytes // (2 if half else 1)
        if weight.dtype == torch.bfloat16 and multiplies() and _in_blocks(packed, weight, 2):
            layer.__class__ = FewRowsLinear
            assert isinstance(layer, FewRowsLinear)
            layer.read(weight.shape)
            layer.part = parts[weight.shape] = parts.get(weight.shape) or layer.find_part()


def _in_blocks(packed: Any, weight: torch.Tensor, group: int) -> bool:
    """Tell whether oneDNN has stored weights as `products.c` reads them: [columns / 64, inner / group, 64, group].

    That is its own business, and differs with its version, the processor and the size; so the first and the last block
    are compared. Weights of 8 bits are followed by the negated sum of each column.
    """
    columns, inner = weight.shape
    sums = -weight.sum(1, dtype=torch.int32) if weight.dtype == torch.int8 else torch.empty(0)
    size = weight.nbytes + sums.nbytes
    if columns % BLOCK or inner % 16 or torch.ops.mkldnn._nbytes(packed) != size:
        return False
    memory = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(packed))
    stored = torch.frombuffer(memory, dtype=weight.dtype, count=weight.numel()).view(-1, inner // group, BLOCK, group)
    given = weight.view(-1, BLOCK, inner // group, group).transpose(1, 2)
    return all(torch.equal(stored[block], given[block]) for block in (0, -1)) and (
        not len(sums) or torch.equal(torch.frombuffer(memory, dtype=torch.int32, offset=weight.nbytes), sums)
    )


def most_cheap_rows(*modules: torch.nn.Module) -> int:
    """Return up to which number of rows a number that has not occurred before costs nothing in these modules.

    oneDNN builds and keeps a program for each shape of a 16-bit matrix product, which takes half a megabyte and a
    millisecond.
    """
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    return FEW_ROWS if all(isinstance(layer, FewRows) for layer in layers) else 4


def quantize(decoder: torch.nn.Module) -> None:
    """Round the weights of all linear layers of a decoder on a CPU to 8 bits (W8A8, dynamic per row)."""
    greatest = _greatest_weight()
    for layer in decoder.modules():
        if type(layer) is not torch.nn.Linear:
            continue
        weight = layer.weight.detach()
        scales = _scales(weight, greatest)
        rounded = (weight / scales).round_().to(torch.int8)
        del layer.weight
        layer.__class__ = Int8Linear
        assert isinstance(layer, Int8Linear)
        layer._packed, layer.weight_bytes = torch.ops.onednn.qlinear_prepack(rounded, None), rounded.nbytes
        layer._scales, layer._zeros = scales[:, 0], torch.zeros(len(scales), dtype=torch.int32)
        plain = layer.bias is None or layer.bias.dtype == weight.dtype
        if plain and weight.dtype in _DTYPES and multiplies() and _in_blocks(layer._packed, rounded, 4):
            layer.__class__ = FewRowsInt8Linear
            assert isinstance(layer, FewRowsInt8Linear)
            layer.read(rounded.shape)


def _scales(matrix: torch.Tensor, greatest: int) -> torch.Tensor:
    """Return by what each row, of [rows, columns], is divided so that `greatest` is its greatest value: [rows, 1]."""
    largest = matrix.abs().amax(-1, keepdim=True).float()
    return largest.div_(greatest).clamp_min_(torch.finfo(torch.float32).tiny)


def _greatest_weight() -> int:
    """Return the greatest weight with which this CPU multiplies 8 bits exactly.

    Without instructions for it (VNNI), two products are added in 16 bits, which overflow.
    """
    row = torch.full((1, 64), 255, dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(torch.full((1, 64), 127, dtype=torch.int8), None)
    product = _int8_product(row, packed, torch.ones(1), torch.zeros(1, dtype=torch.int32))
    return 127 if product.item() == 127 * 127 * 64 else 64


def _int8_product(rows: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Multiply rows [T, in_features], in which 128 is zero, by packed weights; the result is in float32."""
    product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product
