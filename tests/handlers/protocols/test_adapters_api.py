"""The adapters API over real sockets, and what it does around an engine: codes, shapes, limits, hostile input."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis

from container.routes import ROUTES
from handlers.backends.adapters import AdapterInfo
from handlers.backends.vllm.adapters import VllmAdapters, adapter_slots
from handlers.errors import EngineFailed, InvalidRequest, NotFound, ServingError, Unavailable
from handlers.request import Incoming
from properties.secure_mode import SecureMode
from tests.support.scripted import ScriptedBackend, service
from tests.support.scripted_adapters import LoraEngine, make_adapter, scripted_adapters
from tests.support.scripted_server import ServerProcess

KEY = "sesame"
ROOTS = ("/adapters", "/models/shapes/adapters", "/models/model/adapters")


def run(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def ran(*given: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*given, **named), 60))  # type: ignore[arg-type]

    return ran


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "shapes"
    for name in ("a", "b", "c", "a b"):
        make_adapter(path / "adapters" / name)
    make_adapter(path / "adapters" / "high", "rank")
    (path / "adapters" / "empty").mkdir()
    make_adapter(path.parent / "secret" / "outside")
    (path / "adapters" / "link").symlink_to(path.parent / "secret" / "outside")
    return path


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[ServerProcess]:
    environ = {"SCRIPTED_ADAPTERS": "2", "LMI_API_KEY": KEY}
    with ServerProcess(home, "--option", f"api_key={KEY}", **environ) as running:
        yield running.ready()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20, headers={"authorization": f"Bearer {KEY}"}) as session:
        yield session
        for adapter in session.get("/adapters").json()["adapters"]:
            assert session.delete(f"/adapters/{adapter['name']}").status_code == 200


def names(client: httpx.Client) -> list[str]:
    return [adapter["name"] for adapter in client.get("/adapters").json()["adapters"]]


# Over the wire


@pytest.mark.parametrize("root", ROOTS)
def test_an_adapter_is_added_shown_updated_and_removed(client: httpx.Client, root: str) -> None:
    assert client.get(root).json() == {"adapters": []}
    reply = client.post(root, params={"name": "poet", "src": "adapters/a", "pin": "true"})
    assert (reply.status_code, reply.json()) == (200, {"status": "Adapter poet registered"})
    poet = {"name": "poet", "src": "adapters/a", "preload": True, "pin": True}
    assert client.get(root).json() == {"adapters": [poet]}
    assert client.get(f"{root}/poet").json() == poet
    reply = client.post(f"{root}/poet/update", params={"src": "adapters/b"})
    assert (reply.status_code, reply.json()) == (200, {"status": "Adapter poet updated"})
    assert client.get(f"{root}/poet").json() == {**poet, "src": "adapters/b"}
    reply = client.delete(f"{root}/poet")
    assert (reply.status_code, reply.json()) == (200, {"status": "Adapter poet unregistered"})
    assert client.get(root).json() == {"adapters": []}


def test_parameters_may_come_as_json_and_the_alias_is_what_messages_say(client: httpx.Client, home: Path) -> None:
    body = {"name": "component-1", "src": f"file://{home}/adapters/a", "preload": False}
    reply = client.post("/adapters", json=body, headers={"X-Amzn-SageMaker-Adapter-Alias": "Poet"})
    assert (reply.status_code, reply.json()) == (200, {"status": "Adapter Poet registered"})
    reply = client.post("/adapters/component-1/update", json={"pin": True})
    assert reply.status_code == 200
    assert client.get("/adapters/component-1").json()["pin"] is True


def test_adapters_are_listed_as_models_beside_the_one_they_belong_to(client: httpx.Client, home: Path) -> None:
    (own,) = client.get("/v1/models").json()["data"]
    assert "parent" not in own
    assert client.post("/adapters", params={"name": "poet", "src": "adapters/a"}).status_code == 200
    listed = client.get("/v1/models")
    assert listed.json()["data"] == [own, {**own, "id": "poet", "root": "poet", "parent": own["id"]}]
    assert str(home) not in listed.text
    assert client.get("/v1/models/poet").json() == listed.json()["data"][1]
    assert client.delete("/adapters/poet").status_code == 200
    assert client.get("/v1/models").json()["data"] == [own]
    assert client.get("/v1/models/poet").status_code == 404


def test_the_list_is_paged(client: httpx.Client) -> None:
    for name in ("a", "b"):
        assert client.post("/adapters", params={"name": name, "src": f"adapters/{name}"}).status_code == 200
    first = client.get("/adapters", params={"limit": 1}).json()
    assert [adapter["name"] for adapter in first["adapters"]] == ["a"]
    second = client.get("/adapters", params={"limit": 1, "next_page_token": first["nextPageToken"]}).json()
    assert [adapter["name"] for adapter in second["adapters"]] == ["b"]
    assert "nextPageToken" not in second
    assert client.get("/adapters", params={"next_page_token": 99}).json() == {"adapters": []}
    for wrong in ({"limit": "-1"}, {"limit": "x"}, {"next_page_token": "1" * 40}):
        assert client.get("/adapters", params=wrong).status_code == 400


def test_names_that_are_taken_and_places_that_are_full(client: httpx.Client) -> None:
    assert client.post("/adapters", params={"name": "a", "src": "adapters/a"}).status_code == 200
    for name in ("a", "shapes", "model"):
        reply = client.post("/adapters", params={"name": name, "src": "adapters/b"})
        assert reply.status_code == 409, reply.text
    assert client.post("/adapters", params={"name": "b", "src": "adapters/b"}).status_code == 200
    reply = client.post("/adapters", params={"name": "c", "src": "adapters/c"})
    assert reply.status_code == 507
    assert "option.max_cpu_loras" in reply.json()["message"]
    assert client.delete("/adapters/a").status_code == 200
    assert client.post("/adapters", params={"name": "c", "src": "adapters/c"}).status_code == 200
    assert names(client) == ["b", "c"]


def test_an_unknown_adapter_is_a_404_that_names_no_other(client: httpx.Client) -> None:
    assert client.post("/adapters", params={"name": "hidden", "src": "adapters/a"}).status_code == 200
    for method, path in (("GET", "/adapters/x"), ("DELETE", "/adapters/x"), ("POST", "/adapters/x/update")):
        reply = client.request(method, path)
        assert (reply.status_code, reply.json()["message"]) == (404, "there is no adapter 'x'")
    assert client.get("/models/other/adapters").status_code == 404
    assert client.get("/adapters?model_name=other").status_code == 404


@pytest.mark.parametrize(
    ("src", "status"),
    [
        ("adapters/../../secret/outside", 400),
        ("../secret/outside", 400),
        ("adapters/link", 400),
        ("adapters", 400),
        ("/etc", 400),
        ("/nowhere/at/all", 400),
        ("file:///etc", 400),
        ("file:///%2e%2e/etc", 400),
        ("s3://bucket/adapter/", 400),
        ("https://127.0.0.1/adapter", 400),
        ("org/adapter", 400),
        ("~/adapter", 400),
        ("adapters/a\0b", 400),
        ("adapters/" + "x" * 300, 400),
        ("adapters/" + "x/" * 3000, 400),
        (" ", 400),
        ("adapters/nothing", 404),
        ("adapters/empty", 400),
        ("adapters/high", 400),
    ],
)
def test_sources_that_are_refused(client: httpx.Client, home: Path, src: str, status: int) -> None:
    reply = client.post("/adapters", json={"name": "poet", "src": src})
    assert reply.status_code == status, reply.text
    assert reply.json()["message"].startswith("src: ")
    assert str(home.parent) not in reply.text
    assert names(client) == []


@pytest.mark.parametrize("name", ["a b", "../a", "a/b", "", ".a", "é", "x" * 129, "a\n", "-a"])
def test_names_that_are_refused(client: httpx.Client, name: str) -> None:
    reply = client.post("/adapters", json={"name": name, "src": "adapters/a"})
    assert reply.status_code == 400
    assert "name" in reply.json()["message"]


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ({}, b""),
        ({"name": "a"}, b""),
        ({"src": "adapters/a"}, b""),
        ({"name": "a", "src": "adapters/a", "pin": "maybe"}, b""),
        ({}, b'{"name": 1, "src": "adapters/a"}'),
        ({}, b"[]"),
        ({}, b"\xff"),
        ({}, b'{"other": 1}'),
    ],
)
def test_calls_that_are_incomplete(client: httpx.Client, query: dict[str, str], body: bytes) -> None:
    assert client.post("/adapters", params=query, content=body).status_code == 400
    assert names(client) == []


def test_a_failed_update_leaves_the_adapter_as_it_was(client: httpx.Client) -> None:
    assert client.post("/adapters", params={"name": "a", "src": "adapters/a"}).status_code == 200
    reply = client.post("/adapters/a/update", params={"src": "adapters/high"})
    assert reply.status_code == 400
    assert reply.json()["message"] == "src: LoRA rank 64 of the directory is greater than 16"
    assert client.post("/adapters/a/update", json={"name": "b"}).status_code == 400
    assert client.get("/adapters/a").json()["src"] == "adapters/a"


def test_the_key_guards_every_route(server: ServerProcess) -> None:
    guarded = [(route.path, route) for route in ROUTES if route.action == "adapters"]
    assert len(guarded) == 10
    with httpx.Client(base_url=server.url, timeout=20) as stranger:
        for path, route in guarded:
            for method in route.methods:
                assert stranger.request(method, path.format(name="shapes", adapter="a")).status_code == 401


def test_replies_are_as_the_document_says(server: ServerProcess, client: httpx.Client) -> None:
    assert names(client) == []
    headers = {"authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=headers)
    calls: list[tuple[int, str, str, dict[str, Any]]] = [
        (200, "post", "/adapters", {"body": {"name": "a", "src": "adapters/a"}}),
        (409, "post", "/models/{name}/adapters", {"query": {"name": "a", "src": "adapters/a"}}),
        (200, "get", "/adapters", {}),
        (200, "get", "/models/{name}/adapters/{adapter}", {}),
        (200, "post", "/adapters/{adapter}/update", {"query": {"pin": "true"}}),
        (200, "post", "/models/{name}/adapters/{adapter}/update", {"body": {}}),
        (200, "delete", "/adapters/{adapter}", {}),
        (404, "delete", "/models/{name}/adapters/{adapter}", {}),
        (404, "get", "/adapters/{adapter}", {}),
        (400, "post", "/adapters", {"body": {"name": "a", "src": "/"}}),
    ]
    for status, method, path, given in calls:
        named = {key: value for key, value in (("name", "shapes"), ("adapter", "a")) if f"{{{key}}}" in path}
        media = {"media_type": "application/json"} if "body" in given else {}
        case = schema[path][method].Case(path_parameters=named, **given, **media)
        reply = case.call(timeout=20, headers=headers)
        assert reply.status_code == status, (method, path, reply.text)
        case.validate_response(reply)


def test_a_backend_without_adapters_says_so(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "shapes") as server:
        server.ready()
        for method, path in (
            ("GET", "/adapters"),
            ("POST", "/adapters?name=a&src=b"),
            ("DELETE", "/adapters/a"),
        ):
            reply = httpx.request(method, server.url + path, timeout=60)
            assert reply.status_code == 400
            assert "option.enable_lora=true" in reply.json()["message"]


# Around an engine


def of(engine: LoraEngine) -> list[str]:
    return [name.partition("#")[0] for name in engine.loaded.values()]


@run
async def test_a_removed_adapter_serves_its_last_request_and_no_new_one(home: Path) -> None:
    adapters, engine = scripted_adapters(home, 2)
    await adapters.add("a", "adapters/a")
    held = adapters.taken("a", None)
    assert held is not None
    removing = asyncio.create_task(adapters.remove("a"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert adapters.infos() == []
    with pytest.raises(NotFound):
        adapters.taken("a", None)
    assert (of(engine), removing.done()) == (["a"], False)
    held.give_back()
    await removing
    assert engine.loaded == {}


@run
async def test_an_updated_adapter_has_a_name_of_its_own_in_the_engine(home: Path) -> None:
    """vLLM's prefix cache finds keys and values by that name."""
    adapters, engine = scripted_adapters(home, 1)
    await adapters.add("a", "adapters/a")
    old = adapters.taken("a", None)
    await adapters.update("a", "adapters/b")
    new = adapters.taken(None, "a")
    assert old is not None
    assert new is not None
    assert old.request.lora_name != new.request.lora_name
    assert old.request.lora_int_id != new.request.lora_int_id
    assert len(engine.loaded) == 2
    third = asyncio.create_task(adapters.update("a", "adapters/c"))  # there is no third place in the engine
    await asyncio.sleep(0.05)
    assert (len(engine.loaded), third.done()) == (2, False)
    old.give_back()
    await third
    assert adapters.infos()[0].src == "adapters/c"
    new.give_back()
    await adapters.remove("a")
    assert engine.loaded == {}


@run
async def test_a_caller_that_leaves_does_not_stop_a_change(home: Path) -> None:
    adapters, engine = scripted_adapters(home, 1)
    engine.gate.clear()
    adding = asyncio.create_task(adapters.add("a", "adapters/a"))
    await engine.asked.wait()
    adding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await adding
    assert adapters.infos() == []
    engine.gate.set()
    with pytest.raises(ServingError, match="already"):
        await adapters.add("a", "adapters/a")
    assert of(engine) == ["a"]


@run
async def test_an_engine_that_dies_is_told_at_once(home: Path) -> None:
    adapters, engine = scripted_adapters(home, 1)
    engine.gate.clear()
    adding = asyncio.create_task(adapters.add("a", "adapters/a"))
    await engine.asked.wait()
    engine.errored = True
    with pytest.raises(Unavailable):
        await adding
    assert adapters.infos() == []


@run
async def test_a_new_engine_gets_what_the_old_one_had_and_can_still_be_loaded(tmp_path: Path) -> None:
    lost = make_adapter(tmp_path / "adapters" / "lost")
    make_adapter(tmp_path / "adapters" / "kept")
    adapters, engine = scripted_adapters(tmp_path, 2)
    for name in ("lost", "kept"):
        await adapters.add(name, f"adapters/{name}")
    (lost / "rank").write_text("")
    engine.loaded.clear()
    await adapters.load(engine, again=True)
    assert (of(engine), [info.name for info in adapters.infos()]) == (["kept"], ["kept"])


@run
async def test_what_an_operator_allows_is_allowed(tmp_path: Path) -> None:
    make_adapter(tmp_path / "allowed" / "a")
    make_adapter(tmp_path / "allowedish" / "a")
    (tmp_path / "home").mkdir()
    adapters, engine = scripted_adapters(tmp_path / "home", 1, allowed=str(tmp_path / "allowed"))
    with pytest.raises(InvalidRequest, match="allowed_adapter_path"):
        await adapters.add("a", str(tmp_path / "allowedish" / "a"))
    await adapters.add("a", str(tmp_path / "allowed" / "a"))
    assert of(engine) == ["a"]


@run
async def test_secure_mode_holds_for_an_adapter_that_is_added(tmp_path: Path) -> None:
    make_adapter(tmp_path / "home" / "adapters" / "a")
    make_adapter(tmp_path / "home" / "adapters" / "b", "more.bin")
    secure = SecureMode(frozenset({"DISALLOW_PICKLE_FILES"}))
    adapters, engine = scripted_adapters(tmp_path / "home", 2, secure=secure)
    await adapters.add("a", "adapters/a")
    with pytest.raises(InvalidRequest, match="secure mode forbids"):
        await adapters.add("b", "adapters/b")
    assert of(engine) == ["a"]


def test_the_engine_has_room_for_an_adapter_that_is_replaced() -> None:
    assert adapter_slots({"max_loras": 4}, 8, cpu=False) == {"max_loras": 4, "max_cpu_loras": 10}
    assert adapter_slots({"max_loras": 4}, 8, cpu=True) == {"max_loras": 10, "max_cpu_loras": 10}


@run
async def test_a_page_has_a_hundred_adapters_at_most() -> None:
    class Many(VllmAdapters):
        def __init__(self) -> None:
            pass

        def infos(self) -> list[AdapterInfo]:
            return [AdapterInfo(f"a{number}", f"adapters/a{number}") for number in range(150)]

    backend = ScriptedBackend([])
    backend.adapters = Many()
    server = service(backend)
    seen: list[str] = []
    query: dict[str, str] = {"limit": "1000"}
    sizes = []
    while True:
        call = Incoming("/adapters", b"", {}, "r", method="GET", query=query)
        reply = await server.call("adapters", call)
        page = json.loads(reply.body)
        sizes.append(len(page["adapters"]))
        seen += [adapter["name"] for adapter in page["adapters"]]
        if "nextPageToken" not in page:
            break
        query = {"next_page_token": page["nextPageToken"]}
    assert sizes == [100, 50]
    assert seen == [f"a{number}" for number in range(150)]


@run
async def test_a_pinned_adapter_is_answered_for_when_the_engine_has_pinned_it(home: Path) -> None:
    adapters, engine = scripted_adapters(home, 2, places=3)
    engine.pinning.clear()
    adding = asyncio.create_task(adapters.add("poet", "adapters/a", pin=True))
    await engine.pin_asked.wait()
    assert engine.loaded
    assert not adding.done()
    assert not adapters.infos()
    engine.pinning.set()
    await adding
    assert set(engine.pinned) == set(engine.loaded)
    await adapters.add("cook", "adapters/b")
    assert len(engine.loaded) == 2
    assert len(engine.pinned) == 1
    for name, pin in (("cook", True), ("poet", False)):
        engine.removed.clear()
        await adapters.update(name, pin=pin)
        await engine.removed.wait()
    assert [name.partition("#")[0] for number, name in engine.loaded.items() if number in engine.pinned] == ["cook"]
    again = LoraEngine(3)
    await adapters.load(again, again=True)
    assert again.pinned == engine.pinned
    await adapters.remove("cook")
    assert not engine.pinned


@run
async def test_where_an_engine_has_no_place_to_spare_it_is_not_asked_to_pin(home: Path) -> None:
    adapters, engine = scripted_adapters(home, 2, places=2)
    await adapters.add("poet", "adapters/a", pin=True)
    assert [info.pin for info in adapters.infos()] == [True]
    assert not engine.pinned


@run
async def test_an_adapter_that_cannot_be_pinned_is_not_kept(home: Path) -> None:
    adapters, engine = scripted_adapters(home, 2, places=3)
    with pytest.raises(EngineFailed, match="cannot pin"):
        await adapters.add("slippery", "adapters/a", pin=True)
    assert not engine.loaded
    assert not adapters.infos()
    await adapters.add("slippery", "adapters/a")
    assert len(engine.loaded) == 1
