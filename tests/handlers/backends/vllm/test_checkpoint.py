"""A folder without weights is refused before vLLM is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from handlers.backends.vllm.checkpoint import missing_weights


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    reason = missing_weights(tmp_path, "auto")
    assert reason is not None
    assert ".safetensors" in reason
    assert "option.load_format" in reason


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00002.safetensors", "pytorch_model.bin", "original/consolidated.00.pth", "q4.gguf"],
)
def test_any_kind_of_weights_will_do(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    assert missing_weights(tmp_path, "auto") is None


@pytest.mark.parametrize("load_format", ["dummy", "runai_streamer", "tensorizer"])
def test_other_formats_find_their_own(tmp_path: Path, load_format: str) -> None:
    assert missing_weights(tmp_path, load_format) is None
