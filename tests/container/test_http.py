"""The HTTP surface over real sockets: the server in a process of its own, with a backend that obeys the prompt."""

from __future__ import annotations

import json
import re
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.support.scripted_server import ServerProcess

LIMIT = 200_000
HEADERS = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = tmp_path_factory.mktemp("models") / "shapes"
    options = ("--option", f"max_request_size={LIMIT}", "--option", "image_fetch_allow_private=127.0.0.1")
    with ServerProcess(model, *options) as running:
        yield running.ready()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as session:
        yield session


def ask(stream: bool = False, images: tuple[str, ...] = (), **order: Any) -> dict[str, Any]:
    content: Any = json.dumps(order)
    if images:
        content = [{"type": "image_url", "image_url": {"url": url}} for url in images]
        content.append({"type": "text", "text": json.dumps(order)})
    return {"model": "", "messages": [{"role": "user", "content": content}], "stream": stream}


def metric(client: httpx.Client, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def send(server: ServerProcess, body: bytes, path: str = "/v1/chat/completions") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_every_inference_route_answers(client: httpx.Client) -> None:
    for path in (
        "/invocations",
        "/invocations?model_name=model",
        "/predictions/model",
        "/predictions/shapes",
        "/predictions/shapes/1.0",
        "/models/shapes/invoke",
        "/v1/chat/completions",
        "/invocations/v1/chat/completions",
    ):
        reply = client.post(path, json=ask(tokens=3))
        assert reply.status_code == 200, (path, reply.text)
        assert reply.json()["choices"][0]["message"]["content"] == "t0 t1 t2 "
        assert reply.headers["content-length"] == str(len(reply.content))
        assert "server" not in reply.headers


def test_the_openai_client_streams_and_lists_models(server: ServerProcess) -> None:
    openai = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in openai.models.list()] == ["shapes"]
    assert openai.models.retrieve("shapes").id == "shapes"
    stream = openai.chat.completions.create(
        model="shapes", stream=True, messages=[{"role": "user", "content": '{"tokens": 4}'}]
    )
    texts = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
    assert "".join(filter(None, texts)) == "t0 t1 t2 t3 "


def test_a_stream_arrives_while_it_is_made(client: httpx.Client) -> None:
    endless = ask(stream=True, tokens=10_000, pause=0.05)
    with client.stream("POST", "/v1/chat/completions", json=endless) as reply:
        assert reply.headers["cache-control"].startswith("no-cache")
        lines = (line for line in reply.iter_lines() if line.startswith("data:"))
        assert [json.loads(next(lines)[5:])["object"] for _ in range(3)] == ["chat.completion.chunk"] * 3


def test_a_misspelt_name_is_told_in_a_header(client: httpx.Client, server: ServerProcess) -> None:
    for stream in (False, True):
        reply = client.post("/v1/chat/completions", json={**ask(stream), "max_token": 5})
        assert reply.status_code == 200
        assert reply.headers["warning"] == '299 - "max_token is not read; did you mean max_tokens?"'
    assert "warning" not in client.post("/v1/chat/completions", json=ask()).headers
    server.wait_for("max_token is not read; did you mean max_tokens")


def test_wrong_places_methods_and_bodies(client: httpx.Client) -> None:
    for method, path, status, allow in (
        ("GET", "/nowhere", 404, None),
        ("GET", "/invocations", 405, "POST"),
        ("POST", "/health", 405, "GET, HEAD"),
        ("PUT", "/ping", 405, "GET, HEAD, POST"),
        ("DELETE", "/v1/models", 405, "GET, HEAD"),
        ("GET", "/v1/models/other", 404, None),
    ):
        reply = client.request(method, path)
        assert (reply.status_code, reply.headers.get("allow")) == (status, allow), path
    unknown = client.post("/predictions/other", json=ask())
    assert (unknown.status_code, unknown.json()["code"]) == (404, 404)
    assert unknown.json()["message"] == "Model or workflow not found: other"
    assert client.post("/invocations?model_name=other", json=ask()).status_code == 404
    broken = client.post("/v1/chat/completions", content=b"{", headers=HEADERS)
    assert broken.status_code == 400
    assert broken.json()["error"]["type"] == "invalid_request_error"
    assert broken.reason_phrase == "Bad Request"
    xml = client.post("/invocations", content=b"<a/>", headers={"content-type": "text/xml"})
    assert xml.status_code == 415
    assert client.head("/ping").status_code == 200


def test_a_body_over_the_limit_is_refused_by_its_length(client: httpx.Client) -> None:
    reply = client.post("/invocations", content=b"x" * (LIMIT + 1), headers=HEADERS)
    assert reply.status_code == 413
    assert str(LIMIT) in reply.json()["message"]


def test_a_chunked_body_over_the_limit_is_refused_while_it_comes(server: ServerProcess) -> None:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    chunk = b"x" * 50_000
    connection.request("POST", "/invocations", body=iter([chunk] * 5), headers=HEADERS, encode_chunked=True)
    reply = connection.getresponse()
    assert reply.status == 413
    assert reply.getheader("connection") == "close"
    connection.close()


def test_a_chunked_body_within_the_limit_is_read(server: ServerProcess) -> None:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps(ask(tokens=2)).encode()
    connection.request("POST", "/invocations", body=iter([body[:20], body[20:]]), headers=HEADERS)
    assert connection.getresponse().status == 200
    connection.close()


def test_a_client_may_ask_before_it_sends(server: ServerProcess) -> None:
    body = json.dumps(ask(tokens=1)).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        head = "POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        reply = HTTPResponse(connection)
        reply.begin()
        assert reply.status == 200


def test_request_ids_are_echoed_only_when_harmless(client: httpx.Client, server: ServerProcess) -> None:
    def given(**headers: str) -> str:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return client.post("/invocations", json=ask(), headers=named).headers["x-request-id"]

    assert given(x_request_id="abc-1") == "abc-1"
    assert given(x_request_id="abc-1", x_amzn_sagemaker_inference_id="sm-2") == "sm-2"
    for bad in ("a b", "x" * 129, "a\tb", 'a"b', "<a>"):
        assert re.fullmatch("[0-9a-f]{32}", given(x_request_id=bad))
    line = server.wait_for("request_id=sm-2")
    assert "route=/invocations" in line
    assert "status=200" in line
    assert "completion_tokens=1" in line
    assert "ttft_ms=" in line


def test_the_log_never_holds_the_prompt(client: httpx.Client, server: ServerProcess) -> None:
    image = "data:image/png;base64,AAAABBBBCCCC"
    client.post("/v1/chat/completions", json=ask(say="a secret thing "), headers={"x-request-id": "quiet"})
    client.post("/v1/chat/completions", json=ask(images=(image,)), headers={"x-request-id": "illustrated"})
    server.wait_for("container.request.*request_id=illustrated")
    assert "secret thing" not in server.log
    assert "AAAABBBB" not in server.log


def test_an_unexpected_error_is_in_the_log_and_not_in_the_reply(client: httpx.Client, server: ServerProcess) -> None:
    reply = client.post(
        "/v1/chat/completions", json=ask(tokens=0, fail="/etc/shadow"), headers={"x-request-id": "oops-1"}
    )
    assert reply.status_code == 500
    assert "shadow" not in reply.text
    assert "Traceback" not in reply.text
    assert "oops-1" in reply.text
    server.wait_for("container.request.*request_id=oops-1")
    assert "RuntimeError: /etc/shadow" in server.log


def test_an_engine_error_in_a_stream_ends_it(client: httpx.Client) -> None:
    reply = client.post("/v1/chat/completions", json=ask(stream=True, tokens=2, fail="known"))
    assert reply.status_code == 200
    assert "the engine died while it held this request" in reply.text


def test_a_client_that_leaves_a_stream_is_noticed(server: ServerProcess, client: httpx.Client) -> None:
    connection = send(server, json.dumps(ask(stream=True, tokens=10_000, pause=0.05)).encode())
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert metric(client, "lmi_requests_running") == 1
    connection.close()
    until(lambda: metric(client, "lmi_requests_running") == 0)  # sooner than the 500 s of the answer
    server.wait_for("container.request.*ended=client_gone")


def test_a_client_that_leaves_before_its_whole_answer_is_noticed(server: ServerProcess, client: httpx.Client) -> None:
    connection = send(server, json.dumps(ask(tokens=2, pause=600)).encode())
    until(lambda: metric(client, "lmi_requests_running") == 1)
    connection.close()
    until(lambda: metric(client, "lmi_requests_running") == 0)
    server.wait_for("container.request.*status=499.*ended=client_gone")


def test_a_client_that_leaves_while_its_image_is_fetched_is_noticed(
    server: ServerProcess, client: httpx.Client
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as slow:
        url = f"http://127.0.0.1:{slow.getsockname()[1]}/cat.png"
        connection = send(server, json.dumps(ask(images=(url,))).encode())
        fetching, _ = slow.accept()
        fetching.settimeout(60)
        assert fetching.recv(4).startswith(b"GET")
        connection.close()
        while fetching.recv(4096):
            pass
        fetching.close()
    until(lambda: metric(client, "lmi_requests_in_flight") == 0)


def test_a_client_that_does_not_finish_its_body_costs_nothing(server: ServerProcess, client: httpx.Client) -> None:
    before = metric(client, 'lmi_http_requests_total{route="/predictions/{model}",status="499"}')
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /predictions/model HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
    name = 'lmi_http_requests_total{route="/predictions/{model}",status="499"}'
    until(lambda: metric(client, name) == before + 1)


def test_a_head_without_end_is_cut_off(server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n")
        try:
            for _ in range(200):
                connection.sendall(b"a: " + b"b" * 1000 + b"\r\n")
            reply = connection.recv(1000)
        except ConnectionError:
            reply = b""
    assert reply == b"" or b" 431 " in reply


def test_ping_says_why_and_recovers(client: httpx.Client) -> None:
    assert client.get("/ping").json() == {"status": "Healthy", "reason": "ready"}
    assert client.get("/health").json() == {"status": "ok"}
    client.post("/invocations", json=ask(sick=True))
    sick = client.get("/ping")
    assert sick.status_code == 503
    assert sick.json() == {"status": "Unhealthy", "reason": "the engine is being restarted"}
    assert client.get("/health").status_code == 503
    client.post("/invocations", json=ask(sick=False))
    assert client.get("/ping").status_code == 200


def test_ping_is_answered_while_few_chunks_are_under_load(server: ServerProcess, client: httpx.Client) -> None:
    """64 streams of a token each 20 ms: 320 chunks in a tenth of a second, and fewer on a slower machine."""
    body = json.dumps(ask(stream=True, tokens=100_000, pause=0.02)).encode()
    connections = [send(server, body) for _ in range(64)]
    stop = threading.Event()
    passed = 0

    def drain() -> None:
        nonlocal passed
        with selectors.DefaultSelector() as selector:
            for connection in connections:
                selector.register(connection, selectors.EVENT_READ)
            while not stop.is_set():
                for key, _ in selector.select(0.1):
                    assert isinstance(key.fileobj, socket.socket)
                    passed += key.fileobj.recv(65536).count(b"data:")

    reader = threading.Thread(target=drain)
    reader.start()
    until(lambda: metric(client, "lmi_inter_token_latency_seconds_count") > 1000)
    meanwhile = []
    ping = HTTPConnection("127.0.0.1", server.port)
    for _ in range(50):
        before = passed
        ping.request("GET", "/ping")
        assert ping.getresponse().read()
        meanwhile.append(passed - before)
    ping.close()
    assert metric(client, "lmi_requests_running") == 64
    stop.set()
    reader.join()
    for connection in connections:
        connection.close()
    until(lambda: metric(client, "lmi_requests_running") == 0)
    assert sorted(meanwhile)[-3] < 320, meanwhile


def test_metrics_count_what_happened(client: httpx.Client) -> None:
    def numbers() -> dict[str, float]:
        page = client.get("/server/metrics").text
        return {name: float(value) for name, value in re.findall(r"^(lmi_\S+) (\S+)$", page, re.MULTILINE)}

    before = numbers()
    client.post("/invocations", json=ask(tokens=5))
    client.post("/invocations", content=b"{", headers=HEADERS)
    after = numbers()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("lmi_prompt_tokens_total") == 7
    assert grown("lmi_generation_tokens_total") == 5
    assert grown("lmi_time_to_first_token_seconds_count") == 1
    assert grown("lmi_inter_token_latency_seconds_count") == 4
    assert grown("lmi_request_duration_seconds_count") == 1
    assert grown('lmi_errors_total{kind="invalid_request"}') == 1
    assert grown('lmi_http_requests_total{route="/invocations",status="200"}') == 1
    assert grown('lmi_http_requests_total{route="/invocations",status="400"}') == 1
    one = client.get("/metrics", params={"name[]": "lmi_requests_running"}).text
    assert "lmi_requests_running 0.0" in one
    assert "lmi_images_total" not in one
    assert "tgi_" not in client.get("/metrics").text


def test_a_key_guards_everything_but_health(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "m", "--option", "api_key=s3cret", "--option", "log_format=json") as server:
        server.wait_for('"message": "ready after')
        line = json.loads(server.wait_for("listening on"))
        server.port = int(line["message"].rpartition(":")[2])
        with httpx.Client(base_url=server.url, timeout=60) as client:
            assert client.get("/ping").status_code == 200
            assert client.get("/v1/models").status_code == 401
            wrong = client.post("/v1/chat/completions", json=ask(), headers={"authorization": "Bearer no"})
            assert wrong.status_code == 401
            assert wrong.json()["error"]["type"] == "authentication_error"
            right = {"authorization": "Bearer s3cret", "x-request-id": "r-1"}
            assert client.post("/v1/chat/completions", json=ask(), headers=right).status_code == 200
        facts = json.loads(server.wait_for('"request_id": "r-1"'))
        assert facts["status"] == 200
        assert facts["prompt_tokens"] == 7
        assert "s3cret" not in server.log
