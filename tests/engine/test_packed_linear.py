from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from engine import packed_linear
from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.loader import load_model
from engine.machine import computes_bfloat16
from engine.native.library import multiplies
from engine.packed_linear import (
    FEW_ROWS,
    SMALLEST,
    FewRowsInt8Linear,
    FewRowsLinear,
    HalfLinear,
    Int8Linear,
    PackedLinear,
    exact_in_half,
    pack,
    quantize,
)
from engine.tensor_parallel import Ranks, _cut
from tests.support.models import make_llava


class Layers(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.large = torch.nn.Linear(640, 512, bias=True, dtype=dtype)
        self.small = torch.nn.Linear(512, 64, bias=False, dtype=dtype)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.small(self.large(rows))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_give_the_same_numbers_for_any_number_of_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = Layers(dtype)
    packed = copy.deepcopy(plain)
    pack(packed)
    assert isinstance(packed.large, PackedLinear) == (dtype == torch.float32 or computes_bfloat16("cpu"))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for rows in (1, 2, 3, 16, 17, 64, 300):
        data = torch.randn(1, rows, 640, dtype=dtype)
        torch.testing.assert_close(packed(data), plain(data), atol=tolerance, rtol=tolerance)


@torch.inference_mode()
def test_float32_weights_stored_in_bfloat16_take_half_the_memory_and_are_as_exact() -> None:
    torch.manual_seed(0)
    plain = Layers(torch.float32)
    plain.large.weight.copy_(plain.large.weight.bfloat16())
    packed = copy.deepcopy(plain)
    pack(packed)
    assert isinstance(packed.large, HalfLinear)
    assert packed.large.weight_bytes == 640 * 512 * 2
    for rows in (1, 3, 16, 65):
        data = torch.randn(1, rows, 640)
        exact = torch.nn.functional.linear(data.double(), plain.large.weight.double(), plain.large.bias.double())
        theirs, ours = ((layers.large(data).double() - exact).norm() for layers in (plain, packed))
        assert ours < 4 * theirs


FEW = pytest.mark.skipif(not multiplies(), reason="needs AVX512-BF16 and a C compiler, and no AMX")


@FEW
@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inner", "columns"), [(64, 4096), (1024, 256), (1088, 1024)])
def test_few_rows_in_bfloat16_are_as_exact_as_rounding_allows(
    inner: int, columns: int, bias: bool, threads: int
) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(inner, columns, bias, dtype=torch.bfloat16)
    weight, offset = layer.weight.double(), layer.bias.double() if bias else None
    pack(torch.nn.Sequential(layer))
    assert isinstance(layer, FewRowsLinear)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (*range(1, 20), 31, FEW_ROWS - 1, FEW_ROWS):
            data = torch.randn(rows, inner, dtype=torch.bfloat16)
            exact = torch.nn.functional.linear(data.double(), weight, offset)
            got = layer(data).double()
            # Half a unit in the last place of bfloat16, and what sums in float32 lose.
            assert ((got - exact).abs() <= exact.abs() * 2**-8 + exact.norm() / exact.numel() ** 0.5 * 1e-5).all()
    finally:
        torch.set_num_threads(before)


@FEW
@torch.inference_mode()
@pytest.mark.parametrize("inner", [512, 1024, 3072, 4864])
def test_a_row_in_bfloat16_does_not_depend_on_the_rows_beside_it(inner: int) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(inner, 1024, dtype=torch.bfloat16)
    pack(torch.nn.Sequential(layer))
    data = torch.randn(4 * FEW_ROWS, inner, dtype=torch.bfloat16)
    many = layer(data)
    for rows in (1, 2, 7, 16, FEW_ROWS, FEW_ROWS + 1):
        assert torch.equal(layer(data[:rows]), many[:rows])


@FEW
@torch.inference_mode()
def test_rows_of_any_shape_and_layout_are_multiplied() -> None:
    layer = torch.nn.Linear(512, 1024, dtype=torch.bfloat16)
    pack(torch.nn.Sequential(layer))
    data = torch.randn(2, 512, 3, dtype=torch.bfloat16)
    turned = data.transpose(1, 2)
    assert torch.equal(layer(turned), layer(turned.contiguous()))
    assert layer(turned).shape == (2, 3, 1024)
    assert layer(data.new_empty(0, 512)).shape == (0, 1024)


@FEW
@pytest.mark.parametrize("size", [(512, 1000), (1000, 512)])
def test_weights_that_onednn_stores_otherwise_are_left_to_it(size: tuple[int, int]) -> None:
    layer = torch.nn.Linear(*size, dtype=torch.bfloat16)
    pack(torch.nn.Sequential(layer))
    assert isinstance(layer, PackedLinear)
    in_blocks = torch.ops.mkldnn._nbytes(layer._packed) == layer.weight_bytes
    assert isinstance(layer, FewRowsLinear) == in_blocks
    torch.manual_seed(0)
    data = torch.randn(5, size[0], dtype=torch.bfloat16)
    several = torch.cat([data] * 20)  # more rows than products.c takes
    with torch.inference_mode():
        torch.testing.assert_close(layer(data), layer(several)[:5])


@FEW
@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_in_8_bits_become_what_onednn_makes_of_them(dtype: torch.dtype, bias: bool, threads: int) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(1088, 256, bias, dtype=dtype)
    quantize(torch.nn.Sequential(layer))
    assert isinstance(layer, FewRowsInt8Linear)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (0, *range(1, 20), FEW_ROWS - 1, FEW_ROWS):
            data = torch.randn(rows, 1088).to(dtype) * 10
            data[1:2] = 0
            assert torch.equal(layer(data), Int8Linear.forward(layer, data))
    finally:
        torch.set_num_threads(before)


@FEW
@torch.inference_mode()
def test_nan_and_infinity_in_a_row_of_8_bits_stay_in_it() -> None:
    layer = torch.nn.Linear(512, 256)
    quantize(torch.nn.Sequential(layer))
    data = torch.randn(3, 512)
    expected = layer(data)[2]
    data[0, 7], data[1, 500] = float("nan"), float("inf")
    out = layer(data)
    assert not out[:2].isfinite().any()
    assert torch.equal(out[2], expected)


def test_weights_that_float16_does_not_hold_stay_in_float32() -> None:
    torch.manual_seed(0)
    stored = torch.randn(512, 640).bfloat16().float()
    assert exact_in_half(stored / 32)
    assert not exact_in_half(torch.randn(512, 640))  # has more digits
    assert not exact_in_half(stored * 2**15)  # infinite in float16
    assert not exact_in_half(stored * 2**-16)  # subnormal in float16


def test_small_layers_stay_as_they_are_and_large_weights_are_held_once() -> None:
    layers = Layers(torch.float32)
    pack(layers)
    assert type(layers.small) is torch.nn.Linear
    assert [name for name, _ in layers.named_parameters()] == ["large.bias", "small.weight"]
    assert isinstance(layers.large, PackedLinear)
    assert layers.large.weight_bytes == 640 * 512 * 4


@torch.inference_mode()
def test_a_hook_of_a_layer_still_runs() -> None:
    layers = Layers(torch.float32)
    layers.large.register_forward_hook(lambda _, __, out: out * 0)
    pack(layers)
    assert not layers.large(torch.ones(2, 640)).any()


def test_the_large_layers_of_a_loaded_model_on_a_cpu_are_packed(tmp_path: Path) -> None:
    path = make_llava(tmp_path, hidden_size=512, intermediate_size=512)
    loaded = load_model(EngineConfig(model_path=str(path), dtype="float32"), torch.device("cpu"))
    linears = {name: m for name, m in loaded.model.named_modules() if isinstance(m, torch.nn.Linear)}
    large = {name for name, m in linears.items() if m.in_features * m.out_features >= SMALLEST}
    assert large == {name for name, m in linears.items() if isinstance(m, PackedLinear)} < linears.keys()
    assert any("projector" in name for name in large), "what is not in the decoder is packed, too"
    assert any("layers.1.mlp" in name for name in large)


def test_bfloat16_is_packed_only_where_the_cpu_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN refuses it on a CPU that does not compute in it, which is not the one that this runs on."""
    monkeypatch.setattr(packed_linear, "computes_bfloat16", lambda device_type: False)
    layers = Layers(torch.bfloat16)
    pack(layers)
    assert type(layers.large) is torch.nn.Linear
    full = Layers(torch.float32)
    pack(full)
    assert isinstance(full.large, PackedLinear)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_8_bits_are_close_whatever_rows_are_beside_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = Layers(dtype)
    layers = copy.deepcopy(plain)
    quantize(layers)
    assert isinstance(layers.large, Int8Linear)
    assert isinstance(layers.small, Int8Linear)
    assert layers.large.weight_bytes == 640 * 512
    data = torch.randn(1, 70, 640, dtype=dtype)
    data[0, 3] *= 1000
    exact, found = plain(data), layers(data)
    assert found.dtype == dtype
    assert ((found - exact).norm(dim=-1) < 0.05 * exact.norm(dim=-1)).all()
    for row in (0, 3, 69):
        assert torch.equal(layers(data[:, row : row + 1]), found[:, row : row + 1])


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_products_of_8_bits_do_not_overflow(rows: int) -> None:
    layer = torch.nn.Linear(4096, 96)
    layer.weight.fill_(1.0)
    layer.bias.zero_()
    quantize(layer)
    torch.testing.assert_close(layer(torch.ones(rows, 4096)), torch.full((rows, 96), 4096.0))


@torch.inference_mode()
def test_rows_and_weights_of_zeros_give_zeros_in_8_bits() -> None:
    layer = torch.nn.Linear(64, 32, bias=False)
    layer.weight[5] = 0
    quantize(layer)
    assert not layer(torch.zeros(2, 64)).any()
    assert not layer(torch.randn(2, 64))[:, 5].any()


@torch.inference_mode()
def test_layers_that_ranks_share_are_quantised() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 48)
    data = torch.randn(1, 5, 64)
    found = []
    for dim in (0, 1):
        layers = [copy.deepcopy(plain) for _ in range(2)]
        for rank, layer in enumerate(layers):
            _cut(layer, Ranks(rank, 2), dim)
            quantize(layer)
        if dim == 0:
            found.append(torch.cat([layer(data) for layer in layers], -1))
        else:
            found.append(sum(layer(part) for layer, part in zip(layers, data.chunk(2, -1), strict=True)))
    for each in found:
        assert (each - plain(data)).norm() < 0.05 * plain(data).norm()


def test_a_decoder_in_8_bits_has_its_head_and_the_images_encoder_as_they_were(tiny_llava: Path) -> None:
    config = EngineConfig(model_path=str(tiny_llava), dtype="float32", int8=True)
    loaded = load_model(config, torch.device("cpu"))
    linears = {m for m in loaded.model.modules() if isinstance(m, torch.nn.Linear)}
    decoders = {m for m in loaded.decoder.modules() if isinstance(m, torch.nn.Linear)}
    assert decoders
    assert {m for m in linears if isinstance(m, Int8Linear)} == decoders < linears


def test_a_cpu_that_does_not_multiply_8_bits_is_told(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", refuse)
    config = EngineConfig(model_path=str(tiny_llava), dtype="float32", int8=True)
    with pytest.raises(ModelLoadError, match="int8 does not work on this CPU; leave it out: could not create"):
        load_model(config, torch.device("cpu"))
