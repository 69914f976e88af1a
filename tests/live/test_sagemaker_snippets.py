"""The snippets of docs/sagemaker.md, run as they stand but for the model and the image that they ask about."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.live import data_url
from tests.support.sagemaker_platform import Platform, environment, sdk
from tests.support.shapes import ROOT, SHAPES, circle

PAGE = (ROOT / "docs" / "sagemaker.md").read_text()
SNIPPETS: dict[str, str] = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))

# The SDK looks at the endpoint every 30 s.
_RUN = "import sys, time; sleep = time.sleep; time.sleep = lambda s: sleep(min(s, 0.2)); exec(sys.stdin.read())"


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    with Platform(OMP_NUM_THREADS="1", TMPDIR=str(tmp_path)) as running:
        yield running


def run(title: str, platform: Platform, **environ: str) -> str:
    code = SNIPPETS[title]
    assert "llava-hf/llava-1.5-7b-hf" in code
    code = code.replace("llava-hf/llava-1.5-7b-hf", str(SHAPES))
    code = code.replace("https://example.com/image.png", data_url(circle("red")))
    code = code.replace("USER: ", "<|user|>").replace(" ASSISTANT:", "</s><|assistant|>")
    done = subprocess.run(
        [sys.executable, "-c", _RUN],
        input=code,
        capture_output=True,
        text=True,
        timeout=200,
        env={
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/"),
            **environment(platform),
            **environ,
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].lstrip("-!")  # which the SDK draws while it waits


def test_the_page_has_the_snippets_that_are_run() -> None:
    assert SNIPPETS.keys() == {"DJLModel", "Model", "boto3"}


def test_boto3(platform: Platform) -> None:
    assert run("boto3", platform) == "a red circle"
    assert [call for call, _ in platform.asked[:3]] == [
        "CreateModel",
        "CreateEndpointConfig",
        "CreateEndpoint",
    ]


@pytest.mark.parametrize("title", ["DJLModel", "Model"])
def test_the_sdk(platform: Platform, title: str) -> None:
    assert run(title, platform, PYTHONPATH=sdk()) == "a red circle"
    (model,) = [sent for call, sent in platform.asked if call == "CreateModel"]
    container = model["PrimaryContainer"]
    assert container["Image"].endswith("/lmi-handler:gpu")
    assert container["Environment"]["HF_MODEL_ID"] == str(SHAPES)
