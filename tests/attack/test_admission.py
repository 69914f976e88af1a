"""Clients that mean harm by how they send: what they hold is bounded, counted, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import resource
import socket
from collections.abc import AsyncIterator, Iterator, MutableMapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvloop
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from container.app import App
from container.bodies import FLOOR_SECONDS, Bodies, Body, BodyTimeout
from container.http_server import HttpServer, bind
from container.metrics import Metrics
from container.protocol import HEAD_SECONDS
from container.state import ServerState
from handlers.errors import Overloaded, PayloadTooLarge
from properties.configuration import resolve
from tests.support.scripted_server import ServerProcess

MIB = 2**20
MEMORY_MB = 128
OPTIONS = (
    *("--option", f"request_memory_mb={MEMORY_MB}", "--option", "cors_allowed_origin=https://app.example"),
    *("--option", "request_id_header_key=x-request-id"),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("models") / "shapes", *OPTIONS) as running:
        yield running.ready()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with places for two answers."""
    model = tmp_path_factory.mktemp("models") / "shapes"
    places = ("--option", "job_queue_size=1", "--option", "max_rolling_batch_size=1")
    with ServerProcess(model, *OPTIONS, *places) as running:
        yield running.ready()


def connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


def metrics(server: ServerProcess) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=60).text)
    return {s.name: s.value for family in families for s in family.samples if not s.labels}


def refused(server: ServerProcess, kind: str = "overloaded") -> float:
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=60).text)
    return sum(
        s.value
        for family in families
        for s in family.samples
        if s.name == "lmi_errors_total" and s.labels["kind"] == kind
    )


def until(server: ServerProcess, name: str, value: float) -> None:
    for _ in range(400):
        if metrics(server)[name] == value:
            return
    raise AssertionError(f"{name} is {metrics(server)[name]}, not {value}")


@contextmanager
def full(server: ServerProcess) -> Iterator[int]:
    """Both places of `small` are taken. Yields the size of a body that holds one; the clients leave at the end."""
    running = chat(tokens=2, pause=600)
    with connect(server) as one, connect(server) as two:
        for connection in (one, two):
            connection.sendall(head(len(running)) + running)
        until(server, "lmi_requests_in_flight", 2)
        yield len(running)


def chat(padding: int = 0, **order: Any) -> bytes:
    body = {
        "messages": [{"role": "user", "content": json.dumps(order)}],
        "stream": order.get("stream", False),
        "metadata": {"padding": "x" * padding},
    }
    return json.dumps(body).encode()


def head(length: int | None, path: str = "/v1/chat/completions", extra: str = "") -> bytes:
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{framing}\r\n{extra}\r\n".encode()


def received(connection: socket.socket) -> bytes:
    """All until the server closes."""
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionError:
        pass
    return found


def reply_to(server: ServerProcess, sent: bytes) -> bytes:
    with connect(server) as connection:
        with suppress(ConnectionError):
            connection.sendall(sent)
        return received(connection)


def answer(connection: socket.socket) -> int:
    """The status of one reply with a length, read to its end."""
    with HTTPResponse(connection) as reply:
        reply.begin()
        reply.read()
        return reply.status


def status(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1]) if reply else 0


@asynccontextmanager
async def listening(
    folder: Path, kind: type[App] = App, head_seconds: float = HEAD_SECONDS
) -> AsyncIterator[tuple[HttpServer, tuple[str, int]]]:
    """The HTTP server in this process, without a model."""
    (folder / "config.json").write_text("{}")
    life = ServerState()
    app = kind(resolve(model=str(folder), environ={}), life, Metrics(life.stats))
    http = HttpServer(app, head_seconds)
    listener = bind("127.0.0.1", 0)
    address = listener.getsockname()
    serving = asyncio.create_task(http.listen(listener))
    while not http.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    yield http, address
    http.should_exit = True
    await serving


def memory(server: ServerProcess) -> int:
    return psutil.Process(server._process.pid).memory_info().rss


def ask(server: ServerProcess, padding: int = 0) -> int:
    content = chat(padding, tokens=1)
    headers = {"content-type": "application/json"}
    return httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers, timeout=60).status_code


@pytest.mark.parametrize("chunked", [False, True])
def test_paused_bodies_hold_no_more_than_their_memory_and_make_room(server: ServerProcess, chunked: bool) -> None:
    """24 clients declare 60 MB, send 59 and stop; those who send on are served."""
    before, refusals = memory(server), refused(server)
    part = b"x" * MIB
    if chunked:
        part = b"%x\r\n" % len(part) + part + b"\r\n"
    most = 0.0
    with ExitStack() as stack:
        paused = [stack.enter_context(connect(server)) for _ in range(24)]
        for connection in paused:
            try:
                connection.sendall(head(None if chunked else 60 * MIB))
                for _ in range(59):
                    connection.sendall(part)
            except OSError:
                pass
            now = metrics(server)
            most = max(most, now["lmi_request_bodies_held_bytes"])
            assert now["lmi_requests_in_flight"] == 0
        assert most > MEMORY_MB * MIB / 4
        assert most <= MEMORY_MB * MIB
        assert memory(server) - before < (MEMORY_MB * 1.25 + 60 + 50) * MIB
        assert ask(server) == 200
        assert ask(server, 20 * MIB) == 200
        assert refused(server) - refusals >= 21
        assert metrics(server)["lmi_request_bodies_arriving"] <= 3
    until(server, "lmi_request_bodies_held_bytes", 0)
    until(server, "lmi_request_bodies_arriving", 0)


def test_declared_bytes_take_nothing_until_they_come(server: ServerProcess) -> None:
    with ExitStack() as stack:
        for _ in range(24):
            stack.enter_context(connect(server)).sendall(head(60 * MIB))
        until(server, "lmi_request_bodies_arriving", 24)
        assert metrics(server)["lmi_request_bodies_held_bytes"] == 0
        assert ask(server, 20 * MIB) == 200
    until(server, "lmi_request_bodies_arriving", 0)


def test_a_body_is_counted_until_its_reply_has_ended(server: ServerProcess) -> None:
    content = chat(3 * MIB, tokens=2, pause=600)
    with connect(server) as connection:
        connection.sendall(head(len(content)) + content)
        until(server, "lmi_requests_in_flight", 1)
        assert metrics(server)["lmi_request_bodies_held_bytes"] == len(content)
        assert metrics(server)["lmi_request_bodies_arriving"] == 0
    until(server, "lmi_request_bodies_held_bytes", 0)


def test_images_are_held_no_longer_than_until_the_engine_has_them(server: ServerProcess) -> None:
    """So that long answers about large images do not fill the memory for bodies."""
    noise = Image.frombytes("RGB", (1500, 1500), random.Random(1).randbytes(1500 * 1500 * 3))
    noise.save(png := io.BytesIO(), "png", compress_level=0)
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    order = {"type": "text", "text": json.dumps({"tokens": 2, "pause": 600})}
    parts = [order, {"type": "image_url", "image_url": {"url": url}}]
    content = json.dumps({"messages": [{"role": "user", "content": parts}], "stream": True}).encode()
    count = MEMORY_MB * MIB // len(content) + 4
    before = memory(server)
    with ExitStack() as stack:
        for number in range(count):
            stack.enter_context(connect(server)).sendall(head(len(content)) + content)
            until(server, "lmi_requests_in_flight", number + 1)
            until(server, "lmi_request_bodies_held_bytes", (number + 1) * (len(content) - len(url)))
        assert memory(server) - before < MEMORY_MB * MIB * 3 // 4
    until(server, "lmi_request_bodies_held_bytes", 0)


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/chat/completions", {"error": {"message", "type", "param", "code"}}),
        ("/invocations", {"code": None, "type": None, "message": None, "error": None}),
        ("/generate", {"error": None, "error_type": None}),
    ],
)
def test_a_full_server_refuses_by_the_head_alone(
    small: ServerProcess, path: str, shape: dict[str, set[str] | None]
) -> None:
    before = refused(small)
    with full(small) as size:
        extra = "Origin: https://app.example\r\nx-request-id: mine-1\r\n"
        reply = reply_to(small, head(50 * MIB, path, extra))  # and no body
        assert status(reply) == 429
        lines, _, body = reply.partition(b"\r\n\r\n")
        for line in (
            b"retry-after: 1",
            b"x-request-id: mine-1",
            b"access-control-allow-origin: https://app.example",
            b"connection: close",
        ):
            assert line in lines.lower()
        said = json.loads(body)
        assert said.keys() == shape.keys()
        for name, inner in shape.items():
            assert inner is None or said[name].keys() == inner
        assert status(reply_to(small, head(None, path))) == 429
        # The rest of what its sender began to send is thrown away until the reply has been read.
        assert status(reply_to(small, head(2 * MIB, path) + b" " * 2 * MIB)) == 429
        assert metrics(small)["lmi_request_bodies_held_bytes"] == 2 * size
        assert refused(small) - before == 3
        for probe in ("/ping", "/health", "/metrics"):
            assert httpx.get(small.url + probe, timeout=60).status_code == 200
    until(small, "lmi_requests_in_flight", 0)
    assert ask(small) == 200
    small.wait_for("refused 1 requests before reading their bodies: too many requests are waiting")


def test_a_refused_client_keeps_its_connection_where_its_body_is_short(small: ServerProcess) -> None:
    with full(small), httpx.Client(base_url=small.url, timeout=60) as client:
        ports = set()
        for _ in range(5):
            reply = client.post("/v1/chat/completions", content=chat(tokens=1))
            assert reply.status_code == 429
            assert "connection" not in reply.headers
            ports.add(reply.extensions["network_stream"].get_extra_info("client_addr"))
        assert len(ports) == 1
    until(small, "lmi_requests_in_flight", 0)


def test_sessions_are_opened_and_closed_where_no_place_is_free(small: ServerProcess) -> None:
    with full(small), httpx.Client(base_url=small.url, timeout=60) as client:
        opened = client.post("/invocations", json={"requestType": "NEW_SESSION"})
        assert opened.status_code == 200
        name = {"x-amzn-sagemaker-session-id": opened.headers["x-amzn-sagemaker-session-id"].partition(";")[0]}
        assert client.post("/invocations", json={"requestType": "CLOSE"}, headers=name).status_code == 200
        for body in ({"inputs": "{}"}, {"inputs": "{}", "requestType": "CLOSE"}):
            assert client.post("/invocations", json=body).status_code == 429
    until(small, "lmi_requests_in_flight", 0)


def test_bodies_that_arrive_slowly_keep_no_place_from_others(small: ServerProcess) -> None:
    """A place is kept for a body that arrives, but not for longer than 2 s."""
    with connect(small) as one, connect(small) as two:
        for connection in (one, two):
            connection.sendall(head(1000) + b"{")
        until(small, "lmi_request_bodies_arriving", 2)
        while ask(small) == 429:
            pass
        assert metrics(small)["lmi_request_bodies_arriving"] == 2
    until(small, "lmi_request_bodies_arriving", 0)


def test_idle_connections_make_room_under_a_small_descriptor_limit(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "shapes") as server, ExitStack() as stack:
        resource.prlimit(server._process.pid, resource.RLIMIT_NOFILE, (128, 128))
        server.ready()
        busy = stack.enter_context(connect(server))
        stream = chat(tokens=3, pause=2, stream=True)
        busy.sendall(head(len(stream), extra="Connection: close\r\n") + stream)
        until(server, "lmi_requests_in_flight", 1)
        idle = [stack.enter_context(connect(server)) for _ in range(220)]
        for connection in idle[::2]:
            with suppress(ConnectionError):
                connection.sendall(b"GET /pi")  # A head that is never complete is idle, too.
        for _ in range(20):
            assert httpx.get(f"{server.url}/ping", timeout=60).status_code == 200
        assert ask(server) == 200
        assert metrics(server)["lmi_connections"] <= 65
        assert received(idle[0]) == b""  # closed, as the oldest
        newest = idle[-1]
        newest.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert status(received(newest)) == 200
        assert b"[DONE]" in received(busy)


def test_probes_are_answered_where_every_connection_is_busy(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "shapes") as server, ExitStack() as stack:
        resource.prlimit(server._process.pid, resource.RLIMIT_NOFILE, (128, 128))
        server.ready()
        stream = chat(tokens=2, pause=600, stream=True)
        for _ in range(64):
            stack.enter_context(connect(server)).sendall(head(len(stream)) + stream)
        until(server, "lmi_requests_in_flight", 64)
        for _ in range(20):
            assert httpx.get(f"{server.url}/ping", timeout=60).status_code == 200
        reply = reply_to(server, head(len(stream), extra="Connection: close\r\n") + stream)
        assert status(reply) == 429
        assert b"too many connections are open" in reply
        assert metrics(server)["lmi_requests_in_flight"] == 64


def test_a_server_that_was_crowded_answers_again(tmp_path: Path) -> None:
    """Clients that kept their connections are answered on them, and so are new ones."""
    with ServerProcess(tmp_path / "shapes") as server, ExitStack() as stack:
        resource.prlimit(server._process.pid, resource.RLIMIT_NOFILE, (128, 128))
        server.ready()
        content = chat(tokens=1)
        busy = [stack.enter_context(connect(server)) for _ in range(64)]
        for connection in busy:
            connection.sendall(head(len(content)))
        until(server, "lmi_request_bodies_arriving", 64)
        more = [stack.enter_context(connect(server)) for _ in range(4)]
        for connection in more:
            with suppress(ConnectionError):
                connection.sendall(PING + b"\r\n")
        assert answer(more[-1]) == 200
        for connection in busy:
            connection.sendall(content)
            assert answer(connection) == 200
        busy[-1].sendall(head(len(content)) + content)
        assert answer(busy[-1]) == 200
        assert ask(server) == 200


def test_the_descriptor_limit_is_raised_to_what_is_allowed(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "shapes") as server:
        pid = server._process.pid
        hard = min(4096, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1])
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (100, hard))
        server.ready()
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (hard, hard)


PING = b"GET /ping HTTP/1.1\r\nHost: x\r\n"
LAST = PING + b"Connection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (PING + b"X: " + b"a" * 300_000, (431,)),
        (b"GET /" + b"a" * 300_000, (431,)),
        (PING + b"a:\r\n" * 300 + b"\r\n", (431,)),
        (head(None) + b"1;" + b"a" * 300_000, (400,)),
        (head(None) + b"".join(b"1;ext=%s\r\na\r\n" % (b"b" * 500) for _ in range(400)), (400,)),
        (head(None) + b"1\r\na\r\n" * 20_000, (400,)),
        (head(None) + b"2\r\n{}\r\n0\r\n" + b"X: " + b"a" * 100_000 + b"\r\n\r\n", (400, 431)),
        (head(None) + b"2\r\n{}\r\n0\r\n" + b"X: a\r\n" * 20_000 + b"\r\n", (400, 431)),
        (head(None) + b"fffffffffffffffff\r\n", (400,)),
        (head(None) + b"-1\r\na\r\n", (400,)),
        (head(2**62), (413,)),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n", (400,)),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", (400,)),
        (head(5, extra="Content-Length: 6\r\n") + b"{}   ", (400,)),
        (head(5, extra="Transfer-Encoding: chunked\r\n") + b"0\r\n\r\n", (400,)),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400,)),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", (404,)),
        (b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n", (400,)),
        (b"\x16\x03\x01\x02\x00\x01\x00", (400,)),
        (b"GET http://example.com/ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", (200,)),
        (b"GET /ping HTTP/1.0\r\n\r\n", (200,)),
        (b"GET /ping HTTP/1.1\r\nConnection: close\r\n\r\n", (400,)),
        (PING + b"HOST: x\r\nConnection: close\r\n\r\n", (400,)),
        (b"GET /version HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n", (400,)),
        (PING + b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n\r\n" + b"junk" * 100, (200,)),
        (PING + b"Upgrade: websocket\r\nConnection: Upgrade, close\r\nSec-WebSocket-Key: x\r\n\r\n", (200,)),
        (b"\r\n" * 1000 + LAST, (200,)),
    ],
)
def test_odd_http_is_answered_and_bounded(server: ServerProcess, sent: bytes, statuses: tuple[int, ...]) -> None:
    before, lines = memory(server), len(server.lines)
    reply = reply_to(server, sent)
    assert status(reply) in statuses, reply[:300]
    assert memory(server) - before < 20 * MIB
    until(server, "lmi_request_bodies_held_bytes", 0)
    assert len(server.lines) - lines <= 3


def test_a_flood_of_pipelined_requests_is_cut_off(server: ServerProcess) -> None:
    most = 64
    for request in (PING + b"\r\n", b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"):
        assert reply_to(server, request * 5000).count(b"HTTP/1.1 200") <= most
    assert reply_to(server, (PING + b"\r\n") * 10 + LAST).count(b"HTTP/1.1 200 OK") == 11


def test_replies_that_nobody_reads_are_not_piled_up(server: ServerProcess) -> None:
    before = memory(server)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(2)
        connection.connect(("127.0.0.1", server.port))
        with suppress(OSError):
            for _ in range(100_000):
                connection.sendall(PING + b"\r\n")
        assert memory(server) - before < 10 * MIB
    assert ask(server) == 200


def test_a_turn_of_the_event_loop_takes_in_many_connections(tmp_path: Path) -> None:
    """A probe that comes behind a hundred others waits for a few turns, not for a hundred."""

    async def check() -> None:
        async with listening(tmp_path) as (http, address):
            with ExitStack() as stack:
                for _ in range(96):
                    connection = stack.enter_context(socket.socket())
                    connection.setblocking(False)
                    connection.connect_ex(address)
                turns = 0
                while http.connections.open < 96:
                    await asyncio.sleep(0)
                    turns += 1
                assert turns <= 24

    uvloop.run(check())


@pytest.mark.parametrize(
    ("first", "drip"),
    [
        (b"", b"a"),
        (b"", b"\r\n"),
        (b"GET /ping HTTP/1.1\r\n", b"a: b\r\n"),
        (b"GET /ping HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n", b"a"),
        (b"GET /ping HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n", b""),
        (PING + b"\r\n", b"\r\n"),
    ],
)
def test_what_drips_ends_with_the_time_of_a_head(tmp_path: Path, first: bytes, drip: bytes) -> None:
    async def check() -> None:
        async with listening(tmp_path, head_seconds=0.2) as (_, address), asyncio.timeout(60):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(first)
            ended = asyncio.create_task(reader.read())
            while not ended.done():
                writer.write(drip)
                await asyncio.wait({ended}, timeout=0.02)
            with suppress(ConnectionError):
                await ended
            writer.close()

    uvloop.run(check())


def test_a_head_that_begins_during_a_reply_does_not_cut_it(tmp_path: Path) -> None:
    """Its time starts once the reply has ended."""

    class Streams(App):
        go: asyncio.Event

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"first", "more_body": True})
            await Streams.go.wait()
            await send({"type": "http.response.body", "body": b"last", "more_body": False})

    async def check() -> None:
        Streams.go = asyncio.Event()
        async with listening(tmp_path, Streams, 0.0) as (http, address), asyncio.timeout(60):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b"first\r\n")
            (connection,) = http.server_state.connections
            writer.write(b"G")
            while not connection._in_head:  # type: ignore[union-attr]  # noqa: ASYNC110 - without an event
                await asyncio.sleep(0)
            for _ in range(10):
                await asyncio.sleep(0)  # turns in which its time would be up
            Streams.go.set()
            assert await reader.readuntil(b"0\r\n\r\n") == b"4\r\nlast\r\n0\r\n\r\n"
            with suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()

    uvloop.run(check())


@pytest.mark.parametrize("requests", [1, 3])
@pytest.mark.parametrize("rest", [b"\x00\r\n\r\n", b"GET /ping HTTP/1.1\r\n\r\n", b"GET /%s HTTP" % bytes(9)])
def test_requests_before_bytes_that_are_not_http_get_their_replies(tmp_path: Path, requests: int, rest: bytes) -> None:
    class Waits(App):
        go: asyncio.Event

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await Waits.go.wait()
            await super().__call__(scope, receive, send)

    async def check() -> None:
        Waits.go = asyncio.Event()
        async with listening(tmp_path, Waits) as (http, address), asyncio.timeout(60):
            reader, writer = await asyncio.open_connection(*address)
            writer.write((PING + b"\r\n") * requests + rest)
            while not http.server_state.connections:  # noqa: ASYNC110 - without an event
                await asyncio.sleep(0)
            (connection,) = http.server_state.connections
            while not connection._ignores_input:  # type: ignore[union-attr]  # noqa: ASYNC110 - without an event
                await asyncio.sleep(0)
            Waits.go.set()
            replies = await reader.read()
            assert replies.count(b"HTTP/1.1 ") == replies.count(b'"status"') == requests
            assert replies.count(b"connection: close") == 1
            writer.close()

    uvloop.run(check())


def test_a_connection_is_closed_whose_refused_body_came_with_its_head(server: ServerProcess) -> None:
    until(server, "lmi_connections", 1)
    with ExitStack() as stack:
        for _ in range(10):
            connection = stack.enter_context(connect(server))
            connection.sendall(PING + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
            assert status(received(connection)) == 200
        until(server, "lmi_connections", 1)


def test_a_long_body_behind_an_unfinished_reply_is_not_kept(server: ServerProcess) -> None:
    first, second = chat(tokens=2, pause=600), chat(200_000)
    assert reply_to(server, head(len(first)) + first + head(len(second)) + second) == b""
    until(server, "lmi_requests_in_flight", 0)


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upgrade_is_ignored_and_its_body_read(server: ServerProcess, chunked: bool) -> None:
    """As Java's HttpClient asks for HTTP/2 in its first request, here in two of them and in pieces."""
    content = chat(2 * MIB, tokens=1)
    upgrade = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
    sent = head(None if chunked else len(content), extra=upgrade)
    sent += b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content) if chunked else content
    with connect(server) as connection:
        for size in (len(sent), 50):
            for start in range(0, 1000, size):
                connection.sendall(sent[start : start + size])
            connection.sendall(sent[max(size, 1000) :])
            assert answer(connection) == 200
        connection.sendall(LAST.replace(b"close", b"Upgrade, close\r\nUpgrade: h2c"))
        assert status(received(connection)) == 200


def test_a_request_that_is_refused_amid_its_body_is_counted_once(server: ServerProcess) -> None:
    def counted() -> dict[tuple[str, str], float]:
        families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=60).text)
        return {
            (s.labels["route"], s.labels["status"]): s.value
            for family in families
            for s in family.samples
            if s.name == "lmi_http_requests_total" and s.labels["route"] != "/metrics"
        }

    before = counted()
    with connect(server) as connection:
        connection.sendall(head(None) + b"1\r\na\r\n")
        until(server, "lmi_request_bodies_arriving", 1)
        connection.sendall(b"-1\r\n")
        assert status(received(connection)) == 400
    until(server, "lmi_request_bodies_arriving", 0)
    key = ("/v1/chat/completions", "400")
    assert counted() == before | {key: before.get(key, 0) + 1}


def test_a_trailer_is_no_header(server: ServerProcess) -> None:
    content = chat(tokens=1)
    sent = head(None, extra="Connection: close\r\nx-request-id: true-id\r\n")
    sent += b"%x\r\n%s\r\n0\r\nx-request-id: other\r\n\r\n" % (len(content), content)
    reply = reply_to(server, sent)
    assert status(reply) == 200
    assert b"x-request-id: true-id" in reply


def test_an_expected_body_is_not_asked_for_where_it_is_refused(server: ServerProcess) -> None:
    reply = reply_to(server, head(100 * MIB, extra="Expect: 100-continue\r\n"))
    assert status(reply) == 413
    assert b"100 Continue" not in reply


@pytest.mark.parametrize(
    "lines",
    [
        b"Origin: https://evil.example\r\nAccess-Control-Request-Headers: a\r\n",
        b"Origin: https://app.example\r\nAccess-Control-Request-Headers: " + b"a," * 30_000 + b"a\r\n",
        b"Origin: https://app.example\r\nAccess-Control-Request-Headers: a\x0bSet-Cookie: b\r\n",
        b"Origin: " + b"a" * 60_000 + b"\r\n",
        b"Origin: null\r\n",
    ],
)
def test_preflights_reflect_nothing_unchecked(server: ServerProcess, lines: bytes) -> None:
    for path in (b"/v1/chat/completions", b"/metrics", b"/nowhere", b"/adapters/a"):
        sent = b"OPTIONS %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" % path
        reply = reply_to(server, sent + b"Access-Control-Request-Method: POST\r\n" + lines + b"\r\n")
        assert status(reply) in (200, 400)
        assert len(reply) < 1000
        assert b"evil" not in reply
        assert b"Set-Cookie" not in reply


def test_a_flood_of_preflights_leaves_nothing(server: ServerProcess) -> None:
    sent = b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    sent += b"Origin: https://app.example\r\nAccess-Control-Request-Method: POST\r\n\r\n"
    before = memory(server)
    for _ in range(500):
        assert status(reply_to(server, sent)) == 200
    assert memory(server) - before < 10 * MIB
    assert ask(server) == 200


class Arriving:
    """What ASGI hands over of a body, a part at a time."""

    def __init__(self, *parts: bytes, then: Any = None) -> None:
        self.parts = list(parts)
        self.then = then

    async def __call__(self) -> MutableMapping[str, Any]:
        if self.parts:
            part = self.parts.pop(0)
            return {
                "type": "http.request",
                "body": part,
                "more_body": bool(self.parts) or self.then is not None,
            }
        await self.then
        return {"type": "http.request", "body": b"", "more_body": False}


def test_a_body_is_read_up_to_its_limit() -> None:
    async def check() -> None:
        budget = Bodies()
        budget.limit = 100
        body = Body(budget, {}, 4, 60)
        assert await body.read(Arriving(b"ab", b"cd")) == b"abcd"
        assert budget.held == 4
        body.release()
        with pytest.raises(PayloadTooLarge):
            await Body(budget, {}, 3, 60).read(Arriving(b"ab", b"cd"))
        with pytest.raises(PayloadTooLarge):
            await Body(budget, {"content-length": "5"}, 4, 60).read(Arriving(b"ab", b"cd"))

    asyncio.run(check())


@pytest.mark.parametrize("dripping", [False, True])
def test_a_body_that_is_too_slow_ends(dripping: bool) -> None:
    async def drip() -> MutableMapping[str, Any]:
        await (asyncio.sleep(0.001) if dripping else asyncio.Event().wait())
        return {"type": "http.request", "body": b"a", "more_body": True}

    async def check() -> None:
        budget = Bodies(FLOOR_SECONDS if dripping else 0.2, sweep_seconds=0.02)
        budget.limit = MIB
        body = Body(budget, {"content-length": "100000"}, MIB, 60 if not dripping else 0.1)
        with pytest.raises(BodyTimeout, match="took longer" if dripping else "slower than 1024 bytes/s"):
            await body.read(drip)
        assert (budget.held, budget.reading) == (0, set())

    asyncio.run(check())


def test_the_body_that_would_hold_most_for_longest_makes_room() -> None:
    """Not the newest, and not one that is nearly complete."""

    async def check() -> None:
        budget = Bodies()
        budget.limit = 1000
        never, soon = asyncio.Event(), asyncio.Event()
        large = Body(budget, {"content-length": "1000"}, 1000, 60)
        done = Body(budget, {"content-length": "400"}, 1000, 60)
        reading = [
            asyncio.create_task(large.read(Arriving(b"a" * 500, then=never.wait()))),
            asyncio.create_task(done.read(Arriving(b"a" * 399, b"a", then=soon.wait()))),
        ]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert budget.held == 900
        new = Body(budget, {"content-length": "200"}, 1000, 60)
        assert len(await new.read(Arriving(b"a" * 200))) == 200
        with pytest.raises(Overloaded, match="request_memory_mb"):
            await reading[0]
        soon.set()
        assert len(await reading[1]) == 400
        assert budget.held == 600
        for body in (large, done, new):
            body.release()
        assert budget.held == 0

    asyncio.run(check())


def test_making_room_costs_the_same_however_many_bodies_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted are the bodies that are asked what they cost, for each part that finds no room."""
    asked = 0
    cost = Body.cost

    def counted(body: Body) -> float:
        nonlocal asked
        asked += 1
        return cost(body)

    monkeypatch.setattr(Body, "cost", counted)

    async def check() -> None:
        many, parts = 4000, 1000
        budget = Bodies()
        budget.limit = many * 100
        never = asyncio.Event()
        slow = [Body(budget, {"content-length": "100000"}, MIB, 60) for _ in range(many)]
        reading = [asyncio.create_task(body.read(Arriving(b"a" * 100, then=never.wait()))) for body in slow]
        for _ in range(3):
            await asyncio.sleep(0)
        assert (budget.held, len(budget.reading)) == (budget.limit, many)
        assert budget.fits(budget.limit)
        new = Body(budget, {"content-length": str(100 * parts)}, MIB, 60)
        assert len(await new.read(Arriving(*[b"b" * 100] * parts))) == 100 * parts
        assert asked < 30 * parts
        assert budget.refused == parts
        new.release()
        assert budget.fits(budget.limit)
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        for body in slow:
            body.release()
        assert (budget.held, budget.reading) == (0, set())
        assert budget.fits(budget.limit)

    asyncio.run(check())
