"""`lmi serve --print-config`: what it prints, put beside the model, is the same configuration."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from container.cli import main
from container.config import SERVE_DEFAULTS, as_properties, configured
from properties.problem import ConfigurationError
from properties.settings import options

GIVEN = (
    "dtype=fp16",
    'limit_mm_per_prompt={"image": 3}',
    "served_model_name=a,ünïcode name",
    "trust_remote_code=true",
    "chat_template=  {{ messages }} \\n=:# ",
    "port=9000",
)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["serve", *arguments, "--print-config"]) == 0
    return capsys.readouterr().out


def test_the_same_configuration_comes_of_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    monkeypatch.setenv("SAGEMAKER_MAX_PAYLOAD_IN_MB", "3")
    monkeypatch.setenv("OPTION_MAX_MODEL_LEN", "4k")
    text = printed(capsys, str(model), *(part for option in GIVEN for part in ("--option", option)))
    before = configured(str(model), GIVEN, os.environ, SERVE_DEFAULTS)
    (model / "serving.properties").write_text(text)
    after = configured(str(model), (), {}, SERVE_DEFAULTS)
    assert after.settings == before.settings
    assert after.settings.max_request_size == 3 * 2**20


VALUES = (
    "true", "false", "7", "0.5", "16", "a,b", "0;1", "mine.py", " =#! \\ text: ü\n\t", "json", "jsonlines", "debug",
    "float16", '{"image": {"a=b": [1, "c"]}}', '{"image": {"rgba_background_color": [1, 2, 3]}}', '{"image": 3}',
    "[336, 336]", "1,3,336,336", "rolling", "disable", "generate", "pixel_values", "pil", "string", "openai",
    "torchvision", "127.0.0.0/8", "https://app.example",
)  # fmt: skip


def test_every_option_comes_back_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "serving.properties"
    (tmp_path / "mine.py").write_text("")
    # The model's place; what has one value; what needs another; what no file of a model may say.
    left_out = {"model_id", "engine", "enable_auto_tool_choice", "multi_model"}
    tried = {name for name, _, option in options() if not option.secret} - left_out
    changed = set()
    for name in tried:
        for value in VALUES:
            file.unlink(missing_ok=True)
            usual = configured(str(tmp_path), (), {}, SERVE_DEFAULTS).settings
            try:
                before = configured(str(tmp_path), [f"{name}={value}"], {}, SERVE_DEFAULTS)
            except ConfigurationError:
                continue
            if before.settings != usual:
                changed.add(name)
            file.write_text(as_properties(before))
            after = configured(str(tmp_path), (), {}, SERVE_DEFAULTS)
            assert after.settings == before.settings, f"{name}={value}"
    assert changed == tried


def test_secrets_are_left_out_and_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("SERVING_API_KEY", "hush-1")
    text = printed(capsys, str(tmp_path), "--option", "apy_kee=hush-2")
    assert "hush" not in text
    assert "# api_key: left out, as a secret; it comes from SERVING_API_KEY\n" in text
    assert "# option.apy_kee: left out" in text


def test_what_cannot_be_read_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", str(tmp_path), "--option", "dtype=float99", "--print-config"]) == 1
    assert "float99" in capsys.readouterr().err
