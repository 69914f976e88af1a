"""The process from start to stop, as a platform sees it: its port, its answers to signals, its exit status."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from tests.support.live import free_port
from tests.support.scripted_server import ServerProcess
from tests.support.shapes import ROOT, SHAPES


def order(**fields: object) -> dict[str, object]:
    stream = fields.pop("stream", False)
    return {"messages": [{"role": "user", "content": json.dumps(fields)}], "stream": stream}


def begin(server: ServerProcess, **fields: object) -> socket.socket:
    """Send a request and read nothing."""
    body = json.dumps(order(**fields)).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(
        b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    return connection


def until_running(server: ServerProcess) -> None:
    end = time.monotonic() + 60
    with httpx.Client(base_url=server.url, timeout=60) as client:
        while "in_flight 1.0" not in client.get("/metrics").text:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_the_port_answers_while_the_model_loads(tmp_path: Path) -> None:
    os.mkfifo(go := tmp_path / "go")
    with ServerProcess(tmp_path / "m", SCRIPTED_LOAD=f"until {go}") as server:
        server.listening()
        ping = httpx.get(f"{server.url}/ping", timeout=60)
        assert ping.status_code == 503
        assert ping.json() == {"status": "Loading", "reason": "the model is loading"}
        early = httpx.post(f"{server.url}/v1/chat/completions", json=order(), timeout=60)
        assert early.status_code == 503
        assert int(early.headers["retry-after"]) > 0
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 503
        assert httpx.get(f"{server.url}/v1/models", timeout=60).status_code == 200
        go.write_bytes(b"")
        server.ready()
        assert httpx.get(f"{server.url}/ping", timeout=60).status_code == 200


def test_a_probe_is_told_how_far_loading_is(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "m", SCRIPTED_LOAD="halfway") as server:
        server.listening()
        reason = ""
        while "GiB" not in reason:
            ping = httpx.get(f"{server.url}/ping", timeout=60)
            assert ping.status_code == 503
            assert ping.json()["status"] == "Loading"
            reason = ping.json()["reason"]
        assert re.fullmatch(r"the model is loading: 1\.00 GiB of 2\.00 GiB, \S+ [GM]iB/s, \S+ s left", reason)


def test_a_terminal_shows_a_bar(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    ours, theirs = pty.openpty()
    command = ["-m", "tests.support.scripted_server", "lmi", str(tmp_path), "--port", "0"]
    server = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, "SCRIPTED_LOAD": "halfway"}, stdout=theirs
    )
    os.close(theirs)
    try:
        shown = b""
        while re.search(rb"\[#{8}\.{8}\] 1\.00 GiB of 2\.00 GiB, \S+ [GM]iB/s, \d+ s left", shown) is None:
            shown += os.read(ours, 1000)
    finally:
        server.kill()
        server.wait()
        os.close(ours)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_runs_finish(tmp_path: Path, number: int) -> None:
    os.mkfifo(go := tmp_path / "go")
    with ServerProcess(tmp_path / "m") as server:
        server.ready()
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=order(tokens=2, until=str(go), stream=True), timeout=60
        ) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.signal(number)
            server.wait_for("stopping; running requests may finish")
            refused = httpx.post(f"{server.url}/v1/chat/completions", json=order(), timeout=60)
            assert refused.status_code == 503
            assert "stopping" in refused.json()["error"]["message"]
            assert httpx.get(f"{server.url}/ping", timeout=60).json()["status"] == "Draining"
            go.write_bytes(b"")
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        assert server.wait() == 0
        assert "aborting" not in server.log


def test_what_does_not_finish_in_time_is_told_and_the_exit_is_clean(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "m", "--option", "drain_timeout=0.6") as server:
        server.ready()
        with begin(server, tokens=2, pause=600) as connection:
            until_running(server)
            server.signal()
            assert connection.recv(100).startswith(b"HTTP/1.1 503 ")
        assert server.wait() == 0  # sooner than the 600 s of the request
        assert "aborting 1 requests" in server.log


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "m") as server:
        server.ready()
        with begin(server, tokens=2, pause=600):
            until_running(server)
            server.signal()
            server.wait_for("stopping")
            server.signal()
            assert server.wait() == 128 + signal.SIGTERM  # sooner than the 600 s of the request


def test_a_signal_while_the_model_loads_ends_it(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "m", SCRIPTED_LOAD="600") as server:
        server.listening()
        server.signal()
        assert server.wait() == 0  # sooner than the 600 s of the model


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ("not enough memory: lower option.max_model_len", "not enough memory: lower option.max_model_len"),
        ("crash", "RuntimeError: secret detail"),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_the_process(tmp_path: Path, plan: str, told: str) -> None:
    with ServerProcess(tmp_path / "m", SCRIPTED_LOAD=plan) as server:
        assert server.wait() == 1
        assert told in server.log
        assert ("Traceback" in server.log) == (plan == "crash")


def test_loading_has_a_time_limit(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "m", "--option", "model_loading_timeout=0.3", SCRIPTED_LOAD="600") as server:
        assert server.wait() == 1
        assert "raise option.model_loading_timeout" in server.log


def test_a_model_that_cannot_be_fetched_ends_the_process(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "m", "--option", "model_id=s3://nothing-here/model/",
        AWS_ENDPOINT_URL_S3="http://127.0.0.1:9", AWS_ACCESS_KEY_ID="k", AWS_SECRET_ACCESS_KEY="s",
        AWS_MAX_ATTEMPTS="1", SERVING_DOWNLOAD_DIR=str(tmp_path / "d"),
    ) as server:  # fmt: skip
        assert server.wait() == 1
        assert "s3://nothing-here/model/" in server.log
        assert "Traceback" not in server.log


UNSERVED = {"model_type": "opt", "architectures": ["OPTForCausalLM"]}


@pytest.mark.parametrize(
    ("change", "options", "told"),
    [
        ({}, ["max_model_len=100000"], "option.max_model_len = 100000 (--option max_model_len) is more than the 4096"),
        ({}, ["image_token_id=5"], "option.image_token_id is 5, but the model's is 3: leave it out"),
        ({}, ["chat_template={% if %}"], "the chat template of option.chat_template has an error in line 1"),
        ({"config.json": json.dumps(UNSERVED).encode()}, [], "vLLM serves OPTForCausalLM: install vllm"),
        ({"model.safetensors": b"\x10"}, [], "model.safetensors is damaged or cut off"),
        ({}, ["model_id=org/absent", "offline=true"], "org/absent is not in "),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line(tmp_path: Path, change: dict[str, bytes], options: list[str], told: str) -> None:
    shutil.copytree(SHAPES, tmp_path / "m")
    for name, content in change.items():
        (tmp_path / "m" / name).write_bytes(content)
    model = [] if any(option.startswith("model_id") for option in options) else [str(tmp_path / "m")]
    given = [part for option in ["port=0", "rolling_batch=rolling", *options] for part in ("--option", option)]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "container.cli", "serve", *model, *given], capture_output=True, text=True
    )
    assert done.returncode == 1
    (error,) = [line for line in done.stdout.splitlines() if " ERROR " in line]
    assert told in error
    assert "Traceback" not in done.stdout + done.stderr


def test_where_a_start_failed_is_told_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    options = ["model_id=org/absent", f"download_dir={tmp_path}/file/d", "port=0", "log_level=debug"]
    given = [part for option in options for part in ("--option", option)]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "container.cli", "serve", *given], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"downloads cannot be kept in {tmp_path}/file/d: Not a directory; set SERVING_DOWNLOAD_DIR" in done.stdout
    assert "Traceback" in done.stdout


def test_a_wrong_configuration_is_told_whole(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "m", "--option", "dtype=int3", "--option", "job_queue_size=-1") as server:
        assert server.wait() == 1
        assert "option.dtype = 'int3'" in server.log
        assert "job_queue_size = '-1'" in server.log
        assert "Traceback" not in server.log


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with ServerProcess(tmp_path / "m", port=port) as server:
            assert server.wait() == 1
            assert f"cannot listen on 127.0.0.1:{port}" in server.log
            assert "set host and port to an address of this machine that is free" in server.log


def test_only_the_serve_command_listens_on_all_addresses(tmp_path: Path) -> None:
    for command, arguments, host in (
        ("lmi", (), "127.0.0.1"),
        ("lmi", ("--host", "127.0.0.2"), "127.0.0.2"),
        ("serve", (), "0.0.0.0"),
    ):
        with ServerProcess(tmp_path / "m", *arguments, command=command) as server:
            assert server.listening().host == host


def test_the_platform_may_choose_the_port(tmp_path: Path) -> None:
    port = free_port()
    with ServerProcess(tmp_path / "m", port=None, SAGEMAKER_BIND_TO_PORT=str(port)) as server:
        assert server.listening().port == port


@pytest.mark.parametrize("variable", ["OPTION_MODEL_ID", "HF_MODEL_ID"])
def test_a_variable_alone_names_the_model(tmp_path: Path, variable: str) -> None:
    model = tmp_path / "named"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with ServerProcess(None, **{variable: str(model)}) as server:
        server.ready()
        (listed,) = httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"]
        assert listed["id"] == "named"
        assert httpx.post(f"{server.url}/invocations", json=order(), timeout=60).status_code == 200


def test_lmis_options_reach_the_service(tmp_path: Path) -> None:
    options = ("--option", "output_formatter=sse", "--option", "sessions_expiration=90")
    opening, prompt = {"requestType": "NEW_SESSION"}, {"inputs": '{"tokens": 2}'}
    with ServerProcess(tmp_path / "m", *options) as server:
        url = f"{server.ready().url}/invocations"
        assert httpx.post(url, json=prompt, timeout=60).headers["content-type"].startswith("text/event-stream")
        end = httpx.post(url, json=opening, timeout=60).headers["X-Amzn-SageMaker-Session-Id"].partition("Expires=")[2]
        left = datetime.strptime(end, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC) - datetime.now(UTC)
        assert 60 < left.total_seconds() <= 90
    options = ("--option", "tgi_compat=true", "--option", "enable_stateful_sessions=false")
    with ServerProcess(tmp_path / "m", *options) as server:
        url = f"{server.ready().url}/invocations"
        assert httpx.post(url, json=prompt, timeout=60).json()[0]["details"]["generated_tokens"] == 2
        refused = httpx.post(url, json=opening, timeout=60)
        assert refused.status_code == 400
        assert "enable_stateful_sessions" in refused.text


def test_a_model_py_that_is_not_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    code = "from djl_python import Input\n\n@init_handler\ndef init(inputs): pass\n\ndef model_fn(folder): pass\n"
    (tmp_path / "model.py").write_text(code)
    command = [sys.executable, "-m", "container", "serve", str(tmp_path), "--port", "0"]
    found = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert found.returncode == 1, "its config.json says nothing"
    assert "model.py of the model is not used: it defines neither handle nor a formatter" in found.stderr + found.stdout


def test_a_client_that_does_not_read_loses_its_place(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "m", "--option", "chunked_read_timeout=0.5") as server:
        server.ready()
        with begin(server, tokens=10_000, say="x" * 10_000, stream=True):
            assert "ended=stalled" in server.wait_for("container.request")


def test_help_needs_no_torch() -> None:
    code = "import sys, container.cli as c; sys.argv[1:] = ['--help']; sys.modules['torch'] = None; c.main()"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "serve" in found.stdout


def test_check_is_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "container", "check", str(tmp_path), "--json", "--option", "dtype=int3"]
    found = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert found.returncode == 1
    assert "option.dtype = 'int3'" in json.loads(found.stdout)["errors"][0]


def test_prompts_are_logged_when_asked_for_and_images_never(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "m", "--option", "log_prompts=true") as server:
        server.ready()
        url = f"{server.url}/v1/chat/completions"
        httpx.post(
            url, json=order(say="the answer", note="see data:image/png;base64,QUJD and https://x.example/y"), timeout=60
        )
        assert "see [link] and [link]" in server.wait_for("container.prompts: prompt")
        assert "the answer" in server.wait_for("container.prompts: answer")
        httpx.post(url, json=order(say="in parts", stream=True), headers={"x-request-id": "s-1"}, timeout=60)
        assert "in parts" in server.wait_for("container.prompts: answer request_id=s-1")
        server.signal()
        assert server.wait() == 0
        assert "QUJD" not in server.log
        assert "x.example" not in server.log
