"""A model with its own `model.py`, in the manner of DJL Serving, behind the real server."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from handlers.custom.backend import CustomBackend
from handlers.custom.messages import Start
from handlers.errors import CustomCodeError, EngineFailed, Unavailable
from tests.support.live import LiveServer, asked, children_running

ONE_BY_ONE = """
import os, sys, time
import helper
from djl_python import Input, Output
from djl_python.encode_decode import encode

options = {}

def handle(inputs: Input) -> Output:
    if inputs.is_empty():
        options.update(inputs.get_properties())
        print("loading from", os.path.basename(options["model_dir"]))
        return None
    kind = inputs.get_property("Content-Type")
    if kind.startswith("image/"):
        return Output().add_as_json({"size": list(inputs.get_as_image().size)})
    if kind == "text/csv":
        return Output().add_as_json(inputs.get_as_csv())
    if kind == "text/plain":
        return Output().add(inputs.get_as_string().upper()).add_property("Content-Type", "text/plain")
    asked = inputs.get_as_json()
    do = asked.pop("do", "echo")
    if do == "echo":
        return encode(Output(), asked, inputs.get_property("Accept"))
    if do == "properties":
        return {"request": inputs.get_properties(), "options": options, "helper": helper.NAME}
    if do == "raise":
        raise ValueError("a secret detail")
    if do == "error":
        return Output().error("no such animal", code=asked.get("code", 424))
    if do == "memory":
        raise MemoryError
    if do == "exit":
        os._exit(3)
    if do == "sleep":
        time.sleep(asked["seconds"])
        return Output().add("slept")
    if do == "nothing":
        return None
    if do == "object":
        return object()
    if do == "bytes":
        return b"of its own"
    if do == "generator":
        return (f"item {number}" for number in range(2))
    if do == "ndlist":
        return Output().add_as_numpy([])
    if do == "batch":
        return {"batch": inputs.is_batch(), "inputs": len(inputs.get_batches())}
    if do == "two":
        return Output().add("a", key="a").add("b", key="b")
    if do == "headers":
        return Output(201).add("x").add_property("X-Amzn-SageMaker-Custom-Attributes", "a=1").add_property(
            "Content-Length", "99").add_property("bad name", "x").add_property("two-lines", "a\\r\\nb: c")
    if do == "stream":
        def items():
            for number in range(asked["items"]):
                yield f"item {number}"
                if number == asked.get("fail"):
                    raise RuntimeError("a secret detail")
        output = Output().add_stream_content(items())
        if asked.get("events"):
            output = Output().add_property("content-type", "text/event-stream")
            output.add_stream_content(items(), lambda item: f"data: {item}\\n\\n")
        return output
"""

TOGETHER = """
import asyncio
from djl_python import Output

meeting = asyncio.Event()

async def handle(inputs):
    if inputs.is_empty():
        await asyncio.sleep(0)
        return None
    asked = inputs.get_as_json()
    if asked["do"] == "meet":
        await meeting.wait()
        return "met"
    if asked["do"] == "join":
        meeting.set()
        return {"ok": True}
    if asked["do"] == "generate":
        return generate(asked["items"])
    if asked["do"] == "hang":
        try:
            print("hang has begun")
            await asyncio.sleep(3600)
        finally:
            print("hang was cancelled")

async def generate(items):
    for number in range(items):
        yield Output(202).add_property("content-type", "application/jsonlines").add_as_json({"n": number}).add("\\n")
"""


def model(path: Path, code: str, **files: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / "model.py").write_text(code)
    for name, text in files.items():
        (path / f"{name}.py").write_text(text)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    path = model(tmp_path_factory.mktemp("own"), ONE_BY_ONE, helper="NAME = 'helper beside the handler'")
    with LiveServer(path, "dtype=bf16", "predict_timeout=20", "my_own_option=7", HF_TOKEN="hf_secret") as live:
        yield live


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(model(tmp_path_factory.mktemp("together"), TOGETHER)) as live:
        yield live


def ask(server: LiveServer, do: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return server.http.post("/invocations", json={"do": do, **fields}, headers=headers)


def test_the_handler_answers_whatever_the_schema(server: LiveServer) -> None:
    for route in ("/invocations", "/predictions/model", "/v1/chat/completions"):
        body = {"messages": "in a schema of its own", "n": [1, 2]}
        reply = server.http.post(route, json=body)
        assert (reply.status_code, reply.json()) == (200, body)
        assert reply.headers["content-type"] == "application/json"
        assert int(reply.headers["content-length"]) == len(reply.content)
    assert server.http.get("/ping").status_code == 200


def test_content_is_decoded_as_its_type_says(server: LiveServer) -> None:
    image = io.BytesIO()
    Image.new("RGB", (5, 7)).save(image, "PNG")
    reply = server.http.post("/invocations", content=image.getvalue(), headers={"content-type": "image/png"})
    assert reply.json() == {"size": [5, 7]}
    reply = server.http.post("/invocations", content="a,b\n1,2\n", headers={"content-type": "text/csv"})
    assert reply.json() == [{"a": "1", "b": "2"}]
    reply = server.http.post("/invocations", content="grüße", headers={"content-type": "text/plain"})
    assert reply.text == "GRÜSSE"
    assert reply.headers["content-type"] == "text/plain"


def test_the_first_call_sees_the_options_and_each_call_its_headers(server: LiveServer) -> None:
    told = ask(
        server,
        "properties",
        {
            "X-Amzn-SageMaker-Custom-Attributes": "tenant=a;trace=b=c",
            "Authorization": "Bearer secret",
            "Cookie": "a=b",
        },
    ).json()
    assert told["options"]["dtype"] == "bf16"
    assert told["options"]["my_own_option"] == "7"
    assert Path(told["options"]["model_dir"]).is_dir()
    assert "hf_secret" not in json.dumps(told)
    assert told["helper"] == "helper beside the handler"
    assert (told["request"]["tenant"], told["request"]["trace"]) == ("a", "b=c")
    assert not {"authorization", "cookie"} & {name.lower() for name in told["request"]}
    assert "loading from" in server.log


@pytest.mark.parametrize(
    ("do", "fields", "status", "told"),
    [
        ("raise", {}, 424, "ValueError"),
        ("error", {}, 424, "no such animal"),
        ("error", {"code": 418}, 418, "no such animal"),
        ("error", {"code": 7}, 424, "no such animal"),
        ("memory", {}, 507, "MemoryError"),
        ("object", {}, 424, "TypeError"),
        ("ndlist", {}, 424, "AttributeError"),
        ("two", {}, 424, "TypeError"),
    ],
)
def test_errors(server: LiveServer, do: str, fields: dict[str, Any], status: int, told: str) -> None:
    reply = ask(server, do, **fields)
    assert reply.status_code == status
    assert told in reply.json()["error"]
    assert "secret" not in reply.text
    assert reply.reason_phrase not in reply.json()["error"]
    if do == "raise":
        server.wait_for("ValueError: a secret detail")


def test_headers_are_the_handlers_but_for_those_of_the_transport(server: LiveServer) -> None:
    reply = ask(server, "headers")
    assert (reply.status_code, reply.text) == (201, "x")
    assert reply.headers["X-Amzn-SageMaker-Custom-Attributes"] == "a=1"
    assert reply.headers["content-length"] == "1"
    assert "bad name" not in reply.headers
    assert "b" not in reply.headers
    assert ask(server, "nothing").status_code == 204


def test_streams(server: LiveServer) -> None:
    reply = ask(server, "stream", items=3)
    assert reply.headers["content-type"] == "application/jsonlines"
    assert [json.loads(line) for line in reply.text.splitlines()] == [
        {"outputs": f"item {number}"} for number in range(3)
    ]
    reply = ask(server, "stream", items=2, events=True)
    assert reply.headers["content-type"] == "text/event-stream"
    assert reply.text == "data: item 0\n\ndata: item 1\n\n"


def test_any_value_is_a_reply(server: LiveServer) -> None:
    reply = ask(server, "bytes")
    assert (reply.content, reply.headers["content-type"]) == (b"of its own", "application/octet-stream")
    assert ask(server, "generator").text == "item 0item 1"
    assert ask(server, "batch").json() == {"batch": False, "inputs": 1}


@pytest.mark.parametrize("events", [False, True])
def test_a_stream_that_breaks_says_so(server: LiveServer, events: bool) -> None:
    reply = ask(server, "stream", items=5, fail=1, events=events)
    assert reply.status_code == 200
    last = reply.text.rstrip().splitlines()[-1].removeprefix("data: ")
    assert json.loads(last)["code"] == 424
    assert "secret" not in reply.text


def test_a_handler_that_kills_its_process_costs_one_request(server: LiveServer) -> None:
    for _ in range(2):
        reply = ask(server, "exit")
        assert reply.status_code == 500
        assert "ended" in reply.json()["message"]
        assert ask(server, "echo", a=1).json() == {"a": 1}
    assert server.metrics()["lmi_engine_restarts_total"] >= 2


def test_a_client_that_leaves_does_not_stop_the_others(server: LiveServer) -> None:
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/invocations", json={"do": "sleep", "seconds": 0.5}, timeout=0.1)
    assert ask(server, "echo", a=2).json() == {"a": 2}


def test_many_at_once_come_one_by_one(server: LiveServer) -> None:
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda n: ask(server, "echo", n=n).json(), range(40)))
    assert replies == [{"n": n} for n in range(40)]


def test_asynchronous_handlers_work_together(together: LiveServer) -> None:
    with ThreadPoolExecutor(4) as pool:
        meetings = [pool.submit(ask, together, "meet") for _ in range(3)]
        assert ask(together, "join").json() == {"ok": True}
        assert [meeting.result().text for meeting in meetings] == ["met"] * 3
    reply = ask(together, "generate", items=3)
    assert reply.status_code == 202
    assert [json.loads(line) for line in reply.text.splitlines()] == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_a_call_that_nobody_waits_for_is_cancelled(together: LiveServer) -> None:
    with asked(together, {"do": "hang"}):
        together.wait_for("hang has begun")
    together.wait_for("hang was cancelled")


def test_a_call_whose_time_is_up_is_ended_and_its_process_replaced(tmp_path: Path) -> None:
    with LiveServer(model(tmp_path / "own", ONE_BY_ONE, helper="NAME = ''"), "predict_timeout=3") as live:
        reply = ask(live, "sleep", seconds=600)
        assert reply.status_code == 408
        live.wait_for("its process is restarted")
        live.wait_for("process 0 of the model's own handler is back")
        assert ask(live, "echo", a=1).json() == {"a": 1}
        assert len(children_running(live.process.pid, "handlers.custom.worker")) == 1


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("def handle(inputs): return undefined", "NameError"),
        ("import missing_package\ndef handle(inputs): pass", "missing_package"),
        ("from djl_python.huggingface import handle", "djl_python.huggingface"),
        ("async def handle(inputs): raise ValueError('cannot load')", "ValueError: cannot load"),
        (
            "from djl_python import Output\ndef handle(inputs): return Output().error('too big', code=507)",
            "answered 507.*too big",
        ),
        ("import os\ndef handle(inputs): os._exit(1)", "its process ended"),
        ("def another(inputs): pass", "no function 'handle'"),
    ],
)
def test_why_a_handler_cannot_be_loaded(tmp_path: Path, code: str, told: str) -> None:
    path = model(tmp_path / "own", code)
    backend = CustomBackend(Start(str(path), "model.py", "handle", {}), 1, 3)
    with pytest.raises(CustomCodeError, match=told):
        asyncio.run(backend.load())


def test_where_one_of_several_cannot_be_loaded_none_is_left_running(tmp_path: Path) -> None:
    """The first one to come fails, the other takes longer than that."""
    code = """
import os, time
def handle(inputs):
    open(f"pid-{os.getpid()}", "w").close()
    try:
        open("first", "x").close()
    except FileExistsError:
        time.sleep(60)
    raise ValueError("cannot load")
"""
    path = model(tmp_path / "own", code)

    async def run() -> None:
        backend = CustomBackend(Start(str(path), "model.py", "handle", {}), 2, 3)
        with pytest.raises(CustomCodeError, match="cannot load"):
            await backend.load()
        assert not any(runs(int(file.name.removeprefix("pid-"))) for file in path.glob("pid-*"))
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("code", "files", "told"),
    [
        ("def handle(inputs): raise ValueError('cannot load')", {}, "ValueError: cannot load"),
        ("def handle(inputs): pass", {"engine": "x = 1"}, "engine.py beside model.py .* rename it"),
    ],
)
def test_a_handler_that_cannot_be_loaded_ends_the_server_with_the_reason(
    tmp_path: Path, code: str, files: dict[str, str], told: str
) -> None:
    live = LiveServer(model(tmp_path / "own", code, **files), ready=False)
    try:
        live.wait_for(f"the server cannot go on.*{told}")
        assert live.wait() == 1
    finally:
        live.kill()


def test_a_process_that_dies_again_and_again_is_given_up(tmp_path: Path) -> None:
    """Started twice, it dies in its first real call each time."""

    async def run() -> None:
        code = "import os\ndef handle(inputs):\n    if not inputs.is_empty(): os._exit(1)"
        path = model(tmp_path / "own", code)
        backend = CustomBackend(Start(str(path), "model.py", "handle", {}), 1, 1)
        await backend.load()
        assert backend.health().ready
        for _ in range(2):
            with pytest.raises(EngineFailed):
                await (await backend.call({}, b"")).next()
        with pytest.raises(Unavailable, match="too often"):
            await (await backend.call({}, b"")).next()
        assert backend.health().lost
        assert backend.stats().engine_restarts == 1
        await backend.close()

    asyncio.run(run())


PARENT = """
import os, subprocess, time
def handle(inputs):
    if inputs.is_empty():
        return None
    how, end = inputs.get_as_string().split()
    pid = subprocess.Popen(["sleep", "60"]).pid if how == "popen" else os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    open("pid", "w").write(str(pid))
    if end == "dies":
        os._exit(3)
    return "ok"
"""


def runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("how", ["fork", "popen"])
@pytest.mark.parametrize("end", ["dies", "stays"])
def test_processes_of_the_handlers_own_hide_no_death_and_do_not_stay(tmp_path: Path, how: str, end: str) -> None:
    path = model(tmp_path / "own", PARENT)

    async def run() -> None:
        backend = CustomBackend(Start(str(path), "model.py", "handle", {}), 1, 3)
        await backend.load()
        async with asyncio.timeout(60):
            call = await backend.call({"Content-Type": "text/plain"}, f"{how} {end}".encode())
            if end == "dies":
                with pytest.raises(EngineFailed):
                    await call.next()
            else:
                await call.next()
        async with asyncio.timeout(30):  # half of what those processes would take
            await backend.close()

    asyncio.run(run())
    pid, deadline = int((path / "pid").read_text()), time.monotonic() + 30
    while runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_another_file_and_function(tmp_path: Path) -> None:
    path = tmp_path / "own"
    path.mkdir()
    (path / "mine.py").write_text("def answer(inputs):\n    return None if inputs.is_empty() else 'mine'\n")
    with LiveServer(path, "entryPoint=mine.py", "handler=answer") as live:
        assert live.http.post("/invocations", json={}).text == "mine"
