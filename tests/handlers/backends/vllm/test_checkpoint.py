"""A folder without weights is refused before vLLM is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from handlers.backends.vllm.checkpoint import weight_problems


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (reason,) = weight_problems(tmp_path, "auto")
    assert ".safetensors" in reason
    assert "option.load_format" in reason


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "original/consolidated.00.pth", "q4.gguf"],
)
def test_any_kind_of_weights_will_do(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    assert list(weight_problems(tmp_path, "auto")) == []


@pytest.mark.parametrize("load_format", ["dummy", "runai_streamer", "tensorizer"])
def test_other_formats_find_their_own(tmp_path: Path, load_format: str) -> None:
    assert list(weight_problems(tmp_path, load_format)) == []
