"""Child processes of a live server are given the variables that they need, and no secret."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from processes.environment import SERVER_KEYS, child_environment, forget_keys
from properties.configuration import resolve
from tests.support.backend import VLLM
from tests.support.live import LiveServer, chat_body, children_running
from tests.support.shapes import ROOT, SHAPES

KEY = "sk-the-clients-key"
OPERATORS = {
    "AWS_SECRET_ACCESS_KEY": "the-operators-cloud",
    "DATABASE_PASSWORD": "the-operators-database",
    "HF_TOKEN": "hf-the-operators-hub",
    "UNRELATED": "the-operators-own",
}

HANDLER = """
import os

def handle(inputs):
    return None if inputs.is_empty() else dict(os.environ)
"""


def environ_of(process: psutil.Process) -> str:
    return Path(f"/proc/{process.pid}/environ").read_text()


def children_of(server: LiveServer) -> dict[str, psutil.Process]:
    """All descendants, by command line."""
    found = children_running(server.process.pid, "", recursive=True)
    return {" ".join(process.cmdline()): process for process in found}


@pytest.mark.skipif(VLLM, reason="the embedded engine's processes")
def test_the_engine_its_ranks_and_grammar_compilers_get_variables_by_name() -> None:
    with LiveServer(SHAPES, "tensor_parallel_degree=2", SERVING_API_KEY=KEY, **OPERATORS) as server:
        server.http.headers["authorization"] = f"Bearer {KEY}"
        body = chat_body("Say something", response_format={"type": "json_object"}, max_tokens=4)
        assert server.http.post("/v1/chat/completions", json=body).status_code == 200
        children = children_of(server)
        for kind in ("engine.process --rank", "engine.process", "handlers.grammars.worker"):
            assert any(kind in command for command in children), kind
        for command, process in children.items():
            environ = environ_of(process)
            for secret in (KEY, "the-operators"):
                assert secret not in environ, command
                assert secret not in command
            assert "PATH=" in environ
            if "engine.process" in command:
                assert "OMP_NUM_THREADS=1" in environ
        assert KEY not in server.log
        assert server.http.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401


def test_a_custom_handler_gets_the_operators_variables_but_no_key_of_the_server(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(HANDLER)
    with LiveServer(tmp_path, SERVING_API_KEY=KEY, VLLM_API_KEY=KEY, **OPERATORS) as server:
        server.http.headers["authorization"] = f"Bearer {KEY}"
        told = server.http.post("/invocations", json={}).json()
        assert {name: told[name] for name in OPERATORS} == OPERATORS
        assert SERVER_KEYS.isdisjoint(told)
        for command, process in children_of(server).items():
            assert KEY not in environ_of(process)
            assert KEY not in command


@pytest.mark.parametrize("name", sorted(SERVER_KEYS))
def test_every_variable_with_a_key_is_read_and_forgotten(name: str) -> None:
    environ = {name: KEY, "UNRELATED": "stays"}
    found = resolve(model=str(SHAPES), environ=environ, options=[]).settings.api_key
    assert found is not None
    assert found.get_secret_value() == KEY
    assert name not in child_environment("handler", environ)
    assert name not in child_environment("vllm", environ)
    forget_keys(environ)
    assert environ == {"UNRELATED": "stays"}


def test_there_is_no_further_variable_with_a_key() -> None:
    """Of those that the documentation of options and of other containers names."""
    docs = ROOT / "docs"
    named = {
        word.strip("`|,.()")
        for page in ("configuration.md", "deploy.md", "security.md")
        for word in (docs / page).read_text().split()
        if word.strip("`|,.()").endswith("_API_KEY")
    }
    assert named
    assert named <= SERVER_KEYS


def test_what_an_engine_is_given() -> None:
    needed = dict.fromkeys(
        [
            "PATH",
            "LC_ALL",
            "TMPDIR",
            "LD_LIBRARY_PATH",
            "CUDA_VISIBLE_DEVICES",
            "NCCL_DEBUG",
            "OMP_NUM_THREADS",
            "PYTORCH_ALLOC_CONF",
            "TRITON_CACHE_DIR",
            "HF_HOME",
            "HF_HUB_OFFLINE",
            "TOKENIZERS_PARALLELISM",
        ],
        "needed",
    )
    other = dict.fromkeys(
        [
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "HF_HUB_TOKEN_SECRET",
            "TOKENIZERS_TOKEN",
            "AWS_ACCESS_KEY_ID",
            "HTTPS_PROXY",
            "OPTION_HF_TOKEN",
            "SERVING_API_KEY",
            "KUBERNETES_PORT",
        ],
        "other",
    )
    given = child_environment("engine", needed | other)
    root = given.pop("PYTHONPATH")
    assert (Path(root) / "processes" / "environment.py").is_file()
    assert given == needed
    assert child_environment("plain", {"PYTHONPATH": "/mine"})["PYTHONPATH"] == f"{root}:/mine"
