"""Which request goes where, and who may ask for it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from container.access import Cors
from container.app import App
from container.metrics import Metrics
from container.router import ONE, MethodNotAllowed
from container.routes import ROUTES
from container.server import Server
from container.state import ServerState
from handlers.errors import NotFound
from handlers.protocols.errors import own_words
from properties.configuration import resolve
from tests.support.pace import too_long
from tests.support.scripted import ScriptedBackend
from tests.support.scripted_server import ServerProcess

KEY = "the-key-of-the-server"
ASKS_CHAT = {"messages": [{"role": "user", "content": '{"tokens": 2}'}]}
ASKS_TEXT = {"prompt": '{"tokens": 2}'}
ASKS_LMI = {"inputs": '{"tokens": 2}', "parameters": {}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = tmp_path_factory.mktemp("models") / "shapes"
    with ServerProcess(model, "--option", f"api_key={KEY}") as running:
        yield running.ready()


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, timeout=20, headers=headers) as session:
        yield session


def said(reply: httpx.Response) -> tuple[str, str]:
    """The API of a reply, and its text."""
    assert reply.status_code == 200, (reply.url, reply.text)
    body = reply.json()
    if isinstance(body, list):
        return "tgi list", body[0]["generated_text"]
    if "generated_text" in body:
        return "generated_text", body["generated_text"]
    choice = body["choices"][0]
    if body["object"] == "text_completion":
        return "completion", choice["text"]
    return "chat", choice["message"]["content"]


@pytest.mark.parametrize(
    ("path", "template", "name"),
    [
        ("/v1/chat/completions", "/v1/chat/completions", ""),
        ("/v1/chat/completions/", "/v1/chat/completions", ""),
        ("//v1//chat/completions", "/v1/chat/completions", ""),
        ("/v1/v1/chat/completions", "/v1/chat/completions", ""),
        ("/invocations/v1/chat/completions", "/v1/chat/completions", ""),
        ("/generate/v1/chat/completions", "/v1/chat/completions", ""),
        ("/generate_stream/v1/chat/completions", "/v1/chat/completions", ""),
        ("/predictions/model/v1/chat/completions", "/v1/chat/completions", "model"),
        ("/models/a/invoke/v1/chat/completions", "/v1/chat/completions", "a"),
        ("/generate/v1/completions", "/v1/completions", ""),
        ("/invocations/v1/completions", "/v1/completions", ""),
        ("/invocations/", "/invocations", ""),
        ("/predictions/a/1.0", "/predictions/{model}", "a/1.0"),
        ("/models/a/b/invoke", "/models/{model}/invoke", "a/b"),
        ("/", "/", ""),
        ("//", "/", ""),
        ("/v1", "/", ""),
        ("/v1/", "/", ""),
        ("/generate/", "/generate", ""),
        ("/ping", "/ping", ""),
    ],
)
def test_paths_that_clients_build(path: str, template: str, name: str) -> None:
    match = ONE.find(path, "POST")
    assert (match.route.template, match.name) == (template, name)


@pytest.mark.parametrize(
    ("path", "template", "name"),
    [
        ("/", "/health", ""),
        ("/v1/models/", "/v1/models", ""),
        ("/v1/models/org/model", "/v1/models", "org/model"),
        ("/server/metrics", "/metrics", ""),
    ],
)
def test_paths_that_are_read(path: str, template: str, name: str) -> None:
    for method in ("GET", "HEAD"):
        match = ONE.find(path, method)
        assert (match.route.template, match.name) == (template, name)


@pytest.mark.parametrize(
    "path",
    [
        "/nowhere",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages",
        "/v1/audio/transcriptions",
        "/v1/chat/completions/render",
        "/v1/completions/render",
        "/v1/chat/completions/batch",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/docs",
        "/api-doc/openapi.json",
        "/load",
        "/sleep",
        "/wake_up",
        "/reset_prefix_cache",
        "/collective_rpc",
        "/vertex",
        "/v2/health/ready",
        "/v2/models/shapes/infer",
        "/api/v1/generate",
        "/api/extra/generate/stream",
        "/ping/v1/chat/completions",
        "/v1/models/v1/chat/completions",
        "/nowhere/v1/chat/completions",
        "/v1/chat/completions/v1/chat/completions/v1/chat/completions",
        "/predictions/",
        "/models//invoke",
        "/GENERATE",
        "/generate/../generate",
    ],
)
def test_paths_that_are_none(path: str) -> None:
    for method in ("GET", "POST"):
        with pytest.raises(NotFound):
            ONE.find(path, method)


def test_an_unknown_route_of_openais_says_so_in_its_words(client: httpx.Client) -> None:
    reply = client.post("/v1/responses", json={"model": "shapes", "input": "hi"})
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "/v1/chat/completions" in error["message"]


def test_a_path_of_a_megabyte_is_looked_at_once() -> None:
    began = time.process_time()
    for part in ("/", "/v1/chat/completions", "/models/", "/invoke", "a/"):
        with pytest.raises(NotFound):
            ONE.find("/x" + part * (2**20 // len(part)), "POST")
    assert not too_long(time.process_time() - began, 2)


def test_a_wrong_method_names_the_right_ones() -> None:
    for path, allowed in (("/", ("POST", "GET", "HEAD")), ("/generate", ("POST",)), ("/info", ("GET", "HEAD"))):
        with pytest.raises(MethodNotAllowed) as caught:
            ONE.find(path, "DELETE")
        assert caught.value.allowed == allowed


def test_every_schema_is_answered_in_its_own_words_wherever_it_is_asked(client: httpx.Client) -> None:
    for path in ("/invocations", "/predictions/model", "/predictions/shapes/1.0", "/models/shapes/invoke"):
        assert said(client.post(path, json=ASKS_CHAT)) == ("chat", "t0 t1 ")
        assert said(client.post(path, json=ASKS_TEXT)) == ("completion", "t0 t1 ")
        assert said(client.post(path, json=ASKS_LMI)) == ("generated_text", "t0 t1 ")
    for path in ("/v1/chat/completions", "/v1/v1/chat/completions", "/invocations/v1/chat/completions"):
        assert said(client.post(path, json=ASKS_CHAT)) == ("chat", "t0 t1 ")
        assert said(client.post(path, json=ASKS_TEXT)) == ("completion", "t0 t1 ")
        assert said(client.post(path, json=ASKS_LMI)) == ("generated_text", "t0 t1 ")
    for path in ("/v1/completions", "/generate/v1/completions"):
        assert said(client.post(path, json=ASKS_TEXT)) == ("completion", "t0 t1 ")
    for path in ("/", "/v1", "//"):
        assert said(client.post(path, json=ASKS_LMI)) == ("tgi list", "t0 t1 ")
        assert said(client.post(path, json=ASKS_CHAT)) == ("chat", "t0 t1 ")
        assert said(client.post(path, json=ASKS_TEXT)) == ("completion", "t0 t1 ")
    assert said(client.post("/generate", json=ASKS_LMI)) == ("generated_text", "t0 t1 ")


@pytest.mark.parametrize("model", ["", "dummy", "tgi", "http://host:8080/v1", "an endpoint", "ä" * 200, None])
def test_any_model_is_accepted_and_echoed(client: httpx.Client, model: str | None) -> None:
    shown = model or "shapes"
    for path, body in (("/v1/chat/completions", ASKS_CHAT), ("/v1/completions", ASKS_TEXT)):
        assert client.post(path, json={**body, "model": model}).json()["model"] == shown
        stream = client.post(path, json={**body, "model": model, "stream": True}).text
        chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
        assert {chunk["model"] for chunk in chunks} == {shown}
    for path in ("/", "/generate", "/invocations"):
        assert client.post(path, json={**ASKS_LMI, "model": model}).status_code == 200


def test_the_key_guards_all_but_health_and_metrics(server: ServerProcess, client: httpx.Client) -> None:
    seen: set[str] = set()
    with httpx.Client(base_url=server.url, timeout=20) as stranger:
        for route in ROUTES:
            path = route.path
            path = path.replace("{name}", "shapes")
            for method in route.methods:
                body: Any = {"json": ASKS_CHAT} if method == "POST" else {}
                status = stranger.request(method, path, **body).status_code
                opened = 404 if route.template == "/page" else 200  # where there is a key, there is no page
                assert status == (opened if route.open else 401), (method, path)
                known = client.request(method, path, **body).status_code
                assert known in (200, 400, 404, 422), (method, path, known)
            if route.open:
                seen.add(route.template)
    assert seen == {"/ping", "/health", "/metrics", "/page"}


@pytest.mark.parametrize("sent", ["", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", "Bearer -"])
def test_a_wrong_key(server: ServerProcess, sent: str) -> None:
    for path, words in (("/generate", "error"), ("/v1/chat/completions", "error"), ("/invocations", "message")):
        reply = httpx.post(f"{server.url}{path}", json=ASKS_LMI, headers={"authorization": sent}, timeout=60)
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert "Authorization" in str(reply.json()[words])
        assert KEY not in reply.text


def test_ping_and_health_in_every_form(client: httpx.Client) -> None:
    for method, path in (("GET", "/ping"), ("POST", "/ping"), ("GET", "/health"), ("GET", "/"), ("HEAD", "/")):
        assert client.request(method, path).status_code == 200, (method, path)


def test_a_server_that_is_not_ready_in_every_apis_words(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "shapes", SCRIPTED_LOAD="600") as loading:
        loading.listening()
        with httpx.Client(base_url=loading.url, timeout=20) as client:
            root = client.get("/")
            assert root.status_code == 503
            assert root.json()["error"] == "unhealthy"
            assert root.json()["error_type"] == "healthcheck"
            told = client.post("/generate", json=ASKS_LMI)
            assert (told.status_code, told.json()["error_type"]) == (429, "overloaded")
            assert "not ready" in told.json()["error"]
            assert told.headers["retry-after"]
            assert client.post("/tokenize", json=ASKS_TEXT).status_code == 503
            assert client.get("/info").status_code == 429
            assert client.get("/version").status_code == 200
            for path in ("/invocations", "/v1/chat/completions"):
                assert client.post(path, json=ASKS_CHAT).status_code == 503


def test_a_machine_that_holds_a_part_of_the_model_says_who_answers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    state = ServerState()
    app = App(resolve(model=str(tmp_path), environ={}), state, Metrics(state.stats))
    state.serve(ScriptedBackend([]), None)
    transport = httpx.ASGITransport(app=app)

    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/chat/completions", json=ASKS_CHAT)

    reply = asyncio.run(asked())
    assert reply.status_code == 503
    assert reply.json()["error"]["message"].startswith("this machine holds a part of the model")


def test_a_server_of_several_models_lists_none_before_one_is_loaded(tmp_path: Path) -> None:
    """Not the directory of them, as a server of one model lists the one that it loads."""
    state = ServerState()
    configuration = resolve(model=str(tmp_path), environ={}, options=["multi_model=true"])
    transport = httpx.ASGITransport(app=App(configuration, state, Metrics(state.stats)))

    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/v1/models")

    assert asyncio.run(asked()).json() == {"object": "list", "data": []}


def test_a_server_of_several_models_can_refuse_a_request_without_holding_up_others(tmp_path: Path) -> None:
    """The words that a refusal's line in the log may hold are collected before the first request."""
    own_words.cache_clear()
    collected: list[int] = []

    def stop() -> None:
        collected.append(own_words.cache_info().currsize)
        server.request_stop()

    async def run() -> int:
        nonlocal server
        options = ["multi_model=true", "host=127.0.0.1", "port=0"]
        server = Server(resolve(model=str(tmp_path), environ={}, options=options), ready=stop)
        return await server.run()

    server: Server
    assert asyncio.run(run()) == 0
    assert collected == [1]


PAGE = "https://app.example"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


def test_a_page_of_a_browser_may_call_where_the_operator_says_so(tmp_path: Path) -> None:
    options = ("--option", f"cors_allowed_origin={PAGE}", "--option", f"api_key={KEY}")
    with (
        ServerProcess(tmp_path / "shapes", *options) as running,
        httpx.Client(base_url=running.ready().url, timeout=20) as page,
    ):
        asked = page.options("/generate", headers=PREFLIGHT)
        assert (asked.status_code, asked.json()) == (200, {})
        assert asked.headers["access-control-allow-origin"] == PAGE
        assert asked.headers["access-control-allow-headers"] == "authorization,content-type"
        assert "POST" in asked.headers["access-control-allow-methods"]
        headers = {"origin": PAGE, "authorization": f"Bearer {KEY}"}
        for sent, status in ((headers, 200), ({"origin": PAGE}, 401)):
            reply = page.post("/generate", json=ASKS_LMI, headers=sent)
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (status, PAGE)
            assert reply.headers["vary"] == "origin"
        other = page.post("/generate", json=ASKS_LMI, headers={**headers, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        refused = page.options("/generate", headers={**PREFLIGHT, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in refused.headers
        assert page.options("/generate").status_code == 405


def test_any_page_none_and_names_that_are_none() -> None:
    assert Cors(["*"]).headers({"origin": PAGE})["access-control-allow-origin"] == "*"
    assert Cors([]).headers({"origin": PAGE}) == {}
    assert Cors([]).preflight("OPTIONS", PREFLIGHT) is None
    assert Cors(["*"]).preflight("POST", PREFLIGHT) is None
    for names in ("", "a\r\nb: c", "a" * 3000, "a, <b>"):
        asked = {**PREFLIGHT, "access-control-request-headers": names}
        assert "access-control-allow-headers" not in (Cors(["*"]).preflight("OPTIONS", asked) or {})
