"""The notebooks, run as Jupyter runs them: their code cells in order, in their own folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.live import LiveServer
from tests.support.sagemaker_platform import Platform, environment, sdk
from tests.support.shapes import ROOT, SHAPES

FOLDER = ROOT / "examples" / "notebooks"


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    with Platform(OMP_NUM_THREADS="1", TMPDIR=str(tmp_path)) as running:
        yield running


def run(name: str, **environ: str) -> list[str]:
    """Return the lines that the notebook's cells print."""
    notebook = json.loads((FOLDER / name).read_text())
    assert notebook["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    program = (
        "import json, sys, time\nsleep = time.sleep\n"
        "time.sleep = lambda seconds: sleep(min(seconds, 0.2))\n"  # SageMaker's SDK looks every 30 s
        "scope = {'__name__': '__main__'}\n"
        "for number, cell in enumerate(json.load(sys.stdin)):\n"
        "    exec(compile(cell, f'cell {number}', 'exec'), scope)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(cells),
        cwd=FOLDER,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_server_is_asked_with_openai(shapes_server: LiveServer) -> None:
    answer, tokens, color, schema = run("openai.ipynb", LMI_URL=f"{shapes_server.url}/v1")
    assert (answer, color) == ("a red circle", "red")
    assert int(tokens.split()[0]) > 64
    assert json.loads(schema) == {"shapes": [{"color": "green", "shape": "triangle"}]}


def test_a_model_answers_in_a_script() -> None:
    assert run("offline.ipynb") == ["a red circle", "a green triangle; a yellow star", "two"]


def test_an_endpoint_is_made_asked_and_deleted(platform: Platform) -> None:
    lines = run("sagemaker.ipynb", MODEL=str(SHAPES), PYTHONPATH=sdk(), **environment(platform))
    assert platform.container_of("lmi-llava") is None
    assert [call for call, _ in platform.asked if call.startswith("Delete")] == [
        "DeleteEndpointConfig",
        "DeleteEndpoint",
        "DeleteModel",
    ]
    assert [line.lstrip("-!") for line in lines[-2:]] == ["a red circle"] * 2  # the SDK draws while it waits
