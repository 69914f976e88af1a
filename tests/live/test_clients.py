"""The clients that people use, as they are, against one live server: they must get the right answers.

Python packages that cannot live beside ours are installed into directories of their own (`make clients`), JavaScript
ones by `npm ci`. What is not there is skipped, and the summary says so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.live import LiveServer, data_url
from tests.support.shapes import IMAGES, ROOT, SHAPES, circle

CLIENTS = ROOT / "tests" / "clients"
RED_CIRCLE = {"shapes": [{"color": "red", "shape": "circle"}]}


@pytest.fixture(scope="module")
def server(shapes_server: LiveServer) -> LiveServer:
    return shapes_server


def aside(name: str) -> Path:
    """The directory that `make clients` installs a Python package into."""
    path = ROOT / ".venv-clients" / name
    if not (path / "installed").is_file():
        pytest.skip(f"the clients of {name} are not installed (make clients)")
    return path


def said(server: LiveServer, *command: str | Path, packages: Path | None = None, cwd: Path = ROOT) -> Any:
    """What a client's program printed."""
    done = subprocess.run(
        [*map(str, command), server.url, str(IMAGES)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        check=False,
        env={**os.environ, "PYTHONPATH": str(packages or ""), "NO_PROXY": "*", "HF_HUB_OFFLINE": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def listed(version: str) -> str:
    """A client's version, which must be the one that the page on compatibility and its evidence name."""
    assert version in (ROOT / "docs" / "compatibility.md").read_text()
    assert version in (ROOT / "tests" / "evidence.md").read_text().partition("## Clients")[2]
    return version


@pytest.mark.parametrize("major", [3, 1])
def test_openai(server: LiveServer, major: int) -> None:
    packages = None if major == 3 else aside("openai-1")
    answers = said(server, sys.executable, CLIENTS / "ask_openai.py", packages=packages)
    assert listed(answers.pop("version")).partition(".")[0] == str(major)
    assert answers == {
        "chat": "a red circle",
        "finish": "stop",
        "usage adds up": True,
        "two images": "a green triangle; a yellow star",
        "n": ["a red circle", "a red circle"],
        "logprobs": "a red circle</s>",
        "stop": "a red",
        "completion": "a red circle",
        "models": ["shapes"],
        "model": "shapes",
        "stream": "an orange star and a blue square",
        "stream pieces": True,
        "stream roles": ["assistant"],
        "stream finish": ["stop"],
        "stream usage": True,
        "completion stream": "a yellow star",
        "parse": ["orange star", "blue square"],
        "json": RED_CIRCLE,
        "tool": ["report", RED_CIRCLE],
        "tool stream": ["report", RED_CIRCLE],
        "bad image": ["BadRequestError", 400, None],
        "bad stream": ["BadRequestError", 400, None],
        "bad value": ["BadRequestError", 400, "top_p"],
        "bad schema": ["BadRequestError", 400, "response_format"],
        "async": ["a red circle", "a green triangle", "a yellow star", "a black cross"],
        "async stream": "a black cross",
    }


@pytest.mark.parametrize("major", [2, 0])
def test_huggingface_hub(server: LiveServer, major: int) -> None:
    packages = None if major == 2 else aside("text-generation")
    answers = said(server, sys.executable, CLIENTS / "ask_hub.py", packages=packages)
    assert listed(answers.pop("version")).partition(".")[0] == str(major)
    chat = {
        "chat": ["a yellow star", "stop"],
        "chat stream": "a yellow star",
        "create": "a yellow star",
        "json": {"shapes": [{"color": "yellow", "shape": "star"}]},
        "refused chat": 400,
    }
    assert answers == {
        "text": {
            "text": "a red circle",
            "details": ["a red circle", "eos_token", True, "a red circle", True],
            "stream": "a red circle",
            "stream details": ["a red circle", "eos_token", True, True],
            "stop": "a red circle",
            "full text": True,
            "best_of": 1,
            "grammar": {"color": "red"},
            "refused": "Input validation error",
        },
        "async": ["a black cross"] * 4,
        "chat at /": chat,
        "chat at /v1": chat,
        "chat at /invocations": chat,
    }


def test_text_generation(server: LiveServer) -> None:
    answers = said(server, sys.executable, CLIENTS / "ask_text_generation.py", packages=aside("text-generation"))
    assert listed(answers.pop("version")) == "0.7.0"
    assert answers == {
        "generate": ["a red circle", "eos_token", True],
        "best_of": [1, True],
        "stop": "a red circle",
        "stream": "a yellow star",
        "stream end": ["a yellow star", "eos_token"],
        "refused": "Input validation error",
        "chat": "Hello!",
        "async": [["a red circle", "eos_token", True], ["a green triangle", "eos_token", True]],
        "async stream": "a yellow star",
    }


def test_javascript(server: LiveServer) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node on this machine")
    if not (CLIENTS / "js" / "node_modules" / "installed").is_file():
        pytest.skip("the JavaScript clients are not installed (make clients)")
    answers = said(server, node, "ask.mjs", cwd=CLIENTS / "js")
    installed = json.loads((CLIENTS / "js" / "package.json").read_text())["dependencies"].values()
    assert all(listed(version.rpartition("@")[2]) for version in installed)
    refused = answers["current"].pop("refused"), answers["current"].pop("refused stream")
    assert all("top_p is 7.0" in text for text in refused)
    assert "`top_p` must be" in answers["second"].pop("refused")
    assert answers == {
        "second": {
            **dict.fromkeys(("text ", "stream ", "stream end "), "a red circle"),
            **dict.fromkeys(("stream /generate_stream", "stream end /generate_stream"), "a red circle"),
            **dict.fromkeys(("text /generate", "text by endpointUrl"), "a red circle"),
            **dict.fromkeys(("chat", "chat stream"), "a yellow star"),
        },
        "current": {
            **dict.fromkeys(("text", "stream"), "a red circle"),
            **dict.fromkeys(("chat", "chat stream", "chat at /v1"), "a yellow star"),
        },
        "openai": {
            **dict.fromkeys(("chat", "chat stream", "final"), "a yellow star"),
            "completion": "a red circle",
            "models": ["shapes"],
            "refused": ["BadRequestError", 400, "top_p"],
        },
    }


def curl(command: str) -> str:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def spoken(stream: str) -> str:
    """The text of a chat's server-sent events."""
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for line in lines for choice in json.loads(line)["choices"])


def test_curl_as_make_serve_prints_it(server: LiveServer) -> None:
    port = server.url.rpartition(":")[2]
    printed = subprocess.run(
        ["sh", "examples/curl.sh", port], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
    whole, stream = re.findall(r"^curl .*?^JSON$", printed, flags=re.MULTILINE | re.DOTALL)
    assert json.loads(curl(whole))["choices"][0]["message"]["content"] == "an orange star and a blue square"
    answer = curl(stream)
    assert spoken(answer) == "an orange star and a blue square"
    assert answer.endswith("data: [DONE]\n\n")


def test_curl_as_the_models_page_prints_it(server: LiveServer) -> None:
    page = (SHAPES / "README.md").read_text()
    (command,) = re.findall(r"^\$ (curl .*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    command = command.replace("localhost:8080", server.url)
    assert json.loads(curl(command))["choices"][0]["message"]["content"] == "a red circle"


def test_curl_as_tgis_documentation_prints_it(server: LiveServer) -> None:
    """The options and their order are the documentation's; the question is one that this model can answer."""
    body = json.dumps(
        {
            "inputs": f"![]({data_url(circle('red'))})What is in this image?\n\n",
            "parameters": {"max_new_tokens": 20},
        }
    )
    address = server.url.removeprefix("http://")
    whole = curl(f"curl {address}/generate -X POST -d '{body}' -H 'Content-Type: application/json'")
    assert json.loads(whole) == {"generated_text": "a red circle"}
    stream = curl(f"curl -s {address}/generate_stream -X POST -d '{body}' -H 'Content-Type: application/json'")
    events = [json.loads(line.removeprefix("data:")) for line in stream.splitlines() if line]
    assert events[-1]["generated_text"] == "a red circle"
    assert "".join(e["token"]["text"] for e in events if not e["token"]["special"]) == "a red circle"


def test_curl_as_vision_documentation_prints_it(server: LiveServer) -> None:
    content = [
        {"type": "text", "text": "What's in this image?"},
        {"type": "image_url", "image_url": {"url": data_url(circle("red"))}},
    ]
    body = {"model": "llava-hf/llava-1.5-7b-hf", "messages": [{"role": "user", "content": content}]}
    answer = curl(
        f'curl -X POST "{server.url}/v1/chat/completions" -H "Content-Type: application/json" '
        f'-H "Authorization: Bearer $OPENAI_API_KEY" -d "{json.dumps(body).replace(chr(34), chr(92) + chr(34))}"'
    )
    assert json.loads(answer)["choices"][0]["message"]["content"] == "a red circle"
