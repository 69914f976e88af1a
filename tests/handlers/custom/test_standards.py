"""Handlers written for AWS's vLLM and SGLang images, with the real package that those follow."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from properties.configuration import ConfigurationError, resolve
from tests.support.live import LiveServer
from tests.support.shapes import SHAPES

DECORATED = """
import model_hosting_container_standards.sagemaker as standards
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse


@standards.custom_invocation_handler
async def mine(raw_request: Request):
    body = await raw_request.json()
    if body.get("do") == "refuse":
        raise HTTPException(status_code=418, detail="no tea here")
    if body.get("do") == "stream":
        async def parts():
            for number in range(3):
                yield f"data: {number}\\n\\n"
        return StreamingResponse(parts(), media_type="text/event-stream")
    if body.get("do") == "response":
        return JSONResponse({"made": True}, status_code=201, headers={"x-amzn-sagemaker-custom-attributes": "a=1"})
    return {"path": raw_request.url.path, "seen": raw_request.headers["x-seen"], "body": body}
"""
DISCOVERED = """
def custom_sagemaker_invocation_handler():
    return {"found": "by its name"}

def by_variable(request):
    return {"found": "by the variable", "method": request.method}
"""


def model(tmp_path: Path, source: str) -> Path:
    path = tmp_path / "m"
    path.mkdir()
    (path / "model.py").write_text(source)
    return path


def test_a_decorated_handler_answers(tmp_path: Path) -> None:
    pytest.importorskip("model_hosting_container_standards", reason="the package is there beside vLLM")
    with LiveServer(model(tmp_path, DECORATED)) as live:
        reply = live.http.post("/invocations", json={"a": 1}, headers={"X-Seen": "yes"})
        assert reply.json() == {"path": "/invocations", "seen": "yes", "body": {"a": 1}}
        reply = live.http.post("/invocations", json={"do": "response"})
        assert (reply.status_code, reply.json()) == (201, {"made": True})
        assert reply.headers["x-amzn-sagemaker-custom-attributes"] == "a=1"
        reply = live.http.post("/invocations", json={"do": "refuse"})
        assert (reply.status_code, reply.json()["error"]) == (418, "no tea here")
        reply = live.http.post("/invocations", json={"do": "stream"})
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"
        assert live.http.get("/ping").status_code == 200


def test_a_handler_is_found_by_its_name_and_by_the_variable(tmp_path: Path) -> None:
    pytest.importorskip("starlette", reason="Starlette is there beside vLLM")
    path = model(tmp_path, DISCOVERED)
    with LiveServer(path) as live:
        assert live.http.post("/invocations", json={}).json() == {"found": "by its name"}
    with LiveServer(path, CUSTOM_FASTAPI_INVOCATION_HANDLER="model:by_variable") as live:
        assert live.http.post("/invocations", json={}).json() == {
            "found": "by the variable",
            "method": "POST",
        }


def test_without_starlette_the_start_says_where_to_name_it(tmp_path: Path) -> None:
    path = model(tmp_path, DISCOVERED)
    (path / "starlette.py").write_text("raise ImportError")  # as if it were not installed
    with LiveServer(path, ready=False) as live:
        assert live.wait() == 1
        live.wait_for("stopped")
        assert "it needs fastapi or starlette: name one in requirements.txt" in live.log


def test_formatters_of_the_standard_are_refused_by_name(tmp_path: Path) -> None:
    path = model(tmp_path, "def input_formatter(f):\n    return f\n\n@input_formatter\ndef read(request):\n    pass\n")
    shutil.copytree(SHAPES, path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "pictures"))
    with LiveServer(path, ready=False) as live:
        assert live.wait() == 1
        live.wait_for("stopped")
        assert "model.py: formatters are those of djl_python.input_parser and .output_formatter" in live.log


@pytest.mark.parametrize("value", ["/v1/chat/completions", "vllm.entrypoints.openai.api_server:health", "model.py"])
def test_a_variable_that_names_no_function_of_the_models(value: str) -> None:
    with pytest.raises(ConfigurationError, match=r"allowed: FILE\.py:FUNCTION in the model's directory"):
        resolve(model="org/model", environ={"CUSTOM_FASTAPI_INVOCATION_HANDLER": value})


def test_variables_that_are_not_taken_over_are_told() -> None:
    names = {"CUSTOM_FASTAPI_PING_HANDLER", "CUSTOM_PRE_PROCESS", "CUSTOM_FASTAPI_MIDDLEWARE_THROTTLE"}
    found = resolve(model="org/model", environ=dict.fromkeys(names, "model.py:f")).warnings
    assert {str(problem).partition(" has no effect here: ")[0] for problem in found} == names
