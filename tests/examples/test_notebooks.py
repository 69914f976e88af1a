"""The notebooks, run as Jupyter runs them: their code cells in order, in their own folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.live import LiveServer
from tests.support.sagemaker_front import ENDPOINT, KEYS, REGION, SageMakerFront
from tests.support.shapes import ROOT

FOLDER = ROOT / "examples" / "notebooks"


def run(name: str, **environ: str) -> list[str]:
    """Return the lines that the notebook's cells print."""
    notebook = json.loads((FOLDER / name).read_text())
    assert notebook["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    program = (
        "import json, sys\nscope = {'__name__': '__main__'}\n"
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


@pytest.fixture(scope="module")
def aws() -> Iterator[str]:
    """The API with which endpoints are made."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_an_endpoint_is_made_asked_and_deleted(shapes_server: LiveServer, aws: str) -> None:
    with SageMakerFront(shapes_server.url) as front:
        lines = run(
            "sagemaker.ipynb",
            NAME=ENDPOINT,
            INSTANCE="ml.g4dn.xlarge",
            AWS_ENDPOINT_URL_SAGEMAKER=aws,
            AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME=front.url,
            AWS_ACCESS_KEY_ID=KEYS.access_key,
            AWS_SECRET_ACCESS_KEY=KEYS.secret_key,
            AWS_DEFAULT_REGION=REGION,
        )
    assert lines == ["InService", "a red circle", "a red circle"]
