from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.fused import StackedLinear, stack
from engine.loader import load_model
from tests.support.models import make_text_model


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(32, size) for size in (48, 16, 16))


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()


@torch.inference_mode()
def test_stacked_layers_give_the_same_numbers_in_whatever_order_they_are_called() -> None:
    torch.manual_seed(0)
    layer = Layer()
    plain = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    stack(layer)
    stacked = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    assert all(isinstance(part, StackedLinear) for part in stacked)
    first, second = torch.randn(1, 5, 32), torch.randn(1, 5, 32)
    for number, rows in (
        (0, first),
        (1, first),
        (2, first),
        (1, first),
        (0, second),
        (1, first),
        (2, second),
    ):
        torch.testing.assert_close(stacked[number](rows), plain[number](rows))


def test_the_weights_of_stacked_layers_are_held_once() -> None:
    layer = Layer()
    stack(layer)
    assert sum(parameter.numel() for parameter in layer.parameters()) == (48 + 16 + 16) * (32 + 1)


def test_layers_with_a_hook_stay_as_they_are() -> None:
    layer = Layer()
    layer.self_attn.v_proj.register_forward_hook(lambda _, __, out: out)
    stack(layer)
    assert type(layer.self_attn.q_proj) is torch.nn.Linear


@pytest.mark.parametrize(("kind", "fused"), [("llama", True), ("mistral", True), ("qwen3", True), ("gemma2", False)])
def test_decoders_of_llamas_kind_run_fused_and_others_stacked(tmp_path: Path, kind: str, fused: bool) -> None:
    path = make_text_model(tmp_path / kind, kind)
    loaded = load_model(EngineConfig(model_path=str(path), dtype="float32"), torch.device("cpu"))
    assert (loaded.fused is not None) == fused
    layers = list(loaded.decoder.layers)  # type: ignore[arg-type]
    assert all(isinstance(layer.mlp.up_proj, StackedLinear) for layer in layers)
