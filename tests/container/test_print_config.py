"""`lmi serve --print-config`: what it prints, put beside the model, is the same configuration."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from container.cli import main
from container.config import SERVE_DEFAULTS, configured

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
    options = [part for option in GIVEN for part in ("--option", option)]
    text = printed(capsys, str(model), *options)
    before = configured(str(model), GIVEN, os.environ, SERVE_DEFAULTS)
    (model / "serving.properties").write_text(text)
    after = configured(str(model), (), {}, SERVE_DEFAULTS)
    assert after.settings == before.settings
    assert after.settings.max_request_size == 3 * 2**20


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
