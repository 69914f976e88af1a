"""Several models in one container: the platform's contract, and what one model's failure is to the others."""

from __future__ import annotations

import io
import json
import shutil
import signal
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from safetensors.torch import load_file, save_file

from container.models.messages import Start
from container.models.serve import configuration_of
from handlers.backends.devices import unused_on
from tests.support.live import LiveServer, chat_body, children_running, message
from tests.support.sagemaker_front import ENDPOINT, SageMakerFront
from tests.support.shapes import SHAPES, circle, square

FILES = tuple(path for path in SHAPES.iterdir() if path.suffix in (".json", ".jinja", ".safetensors"))
CIRCLE, SQUARE = circle("red"), square("blue")
WHAT = "What is in the image?"
LONG = {"messages": [message("Hello!")], "max_tokens": 300, "ignore_eos": True, "stream": True}


def model_at(place: Path, options: str = "") -> Path:
    place.mkdir(parents=True)
    for path in FILES:
        shutil.copy(path, place)
    (place / "serving.properties").write_text(options)
    return place


def archived(model: Path, top: str = "") -> Path:
    path = model.with_name(model.name + ".tar.gz")
    with tarfile.open(path, "w:gz") as tar:
        tar.add(model, top or ".")
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the platform would put below /opt/ml/models."""
    root = tmp_path_factory.mktemp("ml")
    model_at(root / "hash1" / "model")
    archived(model_at(root / "hash2" / "model"), "shapes")
    model_at(root / "greedy", "option.kv_cache_memory_mb=4096\n")
    (root / "empty").mkdir()
    shutil.copytree(root / "hash1" / "model", root / "torn")
    (root / "torn" / "model.safetensors").write_bytes(b"\0" * 4096)
    (root / "torn" / "serving.properties").write_text("option.kv_cache_memory_mb=8\n")
    shutil.copytree(root / "hash1" / "model", root / "hollow")
    (root / "hollow" / "serving.properties").write_text("option.kv_cache_memory_mb=8\n")
    tensors = load_file(root / "hollow" / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, root / "hollow" / "model.safetensors", {"format": "pt"})
    (root / "starved").mkdir()
    code = "raise OSError(12, 'Cannot allocate memory')\ndef handle(inputs): return None\n"
    (root / "starved" / "model.py").write_text(code)
    (root / "wrong").mkdir()
    shutil.copytree(root / "hash1" / "model", root / "wrong", dirs_exist_ok=True)
    (root / "wrong" / "serving.properties").write_text("option.max_model_len=many\n")
    return root


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def container(models: Path, downloads: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Has memory for two models of the three that it may hold."""
    options = {"SERVING_ALLOWED_MODEL_PATH": str(models), "SERVING_DOWNLOAD_DIR": str(downloads)}
    memory = {"SERVING_MODELS_MEMORY_MB": "2500", "SERVING_MAX_MODELS": "3", "SAGEMAKER_MULTI_MODEL": "true"}
    with LiveServer(tmp_path_factory.mktemp("store"), **options, **memory) as live:
        live.http.timeout = 150  # A model takes seconds to load, and more on a busy machine.
        yield live


@pytest.fixture
def server(container: LiveServer, models: Path) -> LiveServer:
    """The container with the models `one`, from a directory, and `two`, from an archive."""
    for name, place in (("one", "hash1/model"), ("two", "hash2/model.tar.gz")):
        reply = container.http.post("/models", json={"model_name": name, "url": str(models / place)})
        assert reply.status_code in (200, 409), reply.text
    return container


def ask(live: LiveServer, name: str, *content: Any, **fields: Any) -> httpx.Response:
    return live.http.post(f"/models/{name}/invoke", json=chat_body(*content, **fields))


def said(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


def process_of(live: LiveServer, name: str, module: str) -> psutil.Process:
    """The process of a model that runs this module; its server writes its name on its request's line."""
    servers = children_running(live.process.pid, "container.models.serve")
    servers.sort(key=psutil.Process.create_time)
    order = [one["modelName"] for one in live.http.get("/models").json()["models"]]
    assert len(servers) == len(order)
    server = servers[order.index(name)]
    if module == "container.models.serve":
        return server
    return children_running(server.pid, module)[0]


def test_two_models_answer_at_the_same_time(server: LiveServer) -> None:
    asked = [("one", CIRCLE, "a red circle"), ("two", SQUARE, "a blue square")] * 8
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda one: said(ask(server, one[0], one[1], WHAT)), asked))
    assert replies == [right for *_, right in asked]


def test_the_model_is_named_by_path_query_header_or_body(server: LiveServer) -> None:
    body = chat_body(CIRCLE, WHAT)
    for path, more, headers in (
        ("/models/two/invoke", {}, {"X-Amzn-SageMaker-Target-Model": "folder/anything.tar.gz"}),
        ("/predictions/two", {}, {}),
        ("/invocations?model_name=two", {}, {}),
        ("/invocations", {}, {"X-Amzn-SageMaker-Target-Model": "folder/two.tar.gz"}),
        ("/v1/chat/completions", {"model": "two"}, {}),
        ("/models/two/invoke/v1/chat/completions", {}, {}),
    ):
        reply = server.http.post(path, json={**body, **more}, headers={**headers, "x-request-id": "by-name"})
        assert said(reply) == "a red circle"
        assert reply.headers["x-request-id"] == "by-name"
        server.wait_for(r"container.request: request model=two request_id=by-name .*status=200")
    lmi = {"inputs": "Hello!", "parameters": {"max_new_tokens": 3}}
    assert "generated_text" in server.http.post("/models/one/invoke", json=lmi).json()
    assert server.http.post("/tokenize?model_name=one", json={"prompt": "Hello!"}).json()["count"] > 0
    for path in ("/invocations", "/v1/chat/completions", "/info"):
        reply = server.http.request("GET" if path == "/info" else "POST", path, json=body)
        assert (reply.status_code, "model_name" in reply.text) == (404, True)
    reply = server.http.post("/invocations", json=body, headers={"X-Amzn-SageMaker-Target-Model": "none"})
    assert reply.status_code == 404


def test_models_are_listed_by_pages_and_described(server: LiveServer, models: Path) -> None:
    one = {"modelName": "one", "modelUrl": str(models / "hash1/model"), "status": "READY"}
    two = {"modelName": "two", "modelUrl": str(models / "hash2/model.tar.gz"), "status": "READY"}
    assert server.http.get("/models").json() == {"models": [one, two]}
    page = server.http.get("/models?limit=1").json()
    assert page == {"models": [one], "nextPageToken": page["nextPageToken"]}
    assert server.http.get("/models", params={"limit": 1, "next_page_token": page["nextPageToken"]}).json() == {
        "models": [two]
    }
    assert server.http.get("/models/two").json() == two
    assert [model["id"] for model in server.http.get("/v1/models").json()["data"]] == ["one", "two"]
    assert server.http.get("/models?next_page_token=x").status_code == 400
    assert server.http.get("/ping").status_code == 200


@pytest.mark.parametrize(("options", "kept"), [([], False), (["spare_engine=true"], True)])
def test_no_model_keeps_a_spare_engine_unless_asked_to(models: Path, options: list[str], kept: bool) -> None:
    order = Start("m", str(models / "hash1" / "model"), "", options, "text", "info")
    assert configuration_of(order, {}).settings.spare_engine is kept


def test_that_a_model_has_one_replica_is_no_option_without_effect(models: Path) -> None:
    order = Start("m", str(models / "hash1" / "model"), "", [], "text", "info")
    settings = configuration_of(order, {}).settings
    assert settings.min_workers == 1
    assert not unused_on(settings, accelerators=2, replicas=2, per_replica=1)


def test_what_is_not_loaded_is_404(server: LiveServer) -> None:
    for method, path in (("GET", "/models/none"), ("DELETE", "/models/none"), ("POST", "/models/none/invoke")):
        reply = server.http.request(method, path, json={"inputs": "Hello!"} if method == "POST" else None)
        assert (reply.status_code, reply.json()["code"]) == (404, 404)
    assert server.http.put("/models/one").status_code == 405


def test_a_name_that_is_taken_is_409(server: LiveServer, models: Path) -> None:
    body = {"model_name": "one", "url": str(models / "hash1/model")}
    assert server.http.post("/models", json=body).status_code == 409
    assert said(ask(server, "one", CIRCLE, WHAT)) == "a red circle"


def test_a_model_that_does_not_fit_is_507_with_the_figures(server: LiveServer, models: Path) -> None:
    for place in ("greedy", "hash1/model"):
        reply = server.http.post("/models", json={"model_name": "three", "url": str(models / place)})
        assert reply.status_code == 507
        assert "needs about" in reply.json()["message"]
        assert "of 2.44 GiB are free" in reply.json()["message"]
    assert server.http.get("/models/three").status_code == 404


@pytest.mark.parametrize(
    ("name", "place", "status", "told"),
    [
        ("a/b", "hash1/model", 400, "model_name"),
        ("../x", "hash1/model", 400, "model_name"),
        ("x" * 129, "hash1/model", 400, "model_name"),
        ("x", "", 400, "not below a directory"),
        ("x", "../../..", 400, "not below a directory"),
        ("x", "nothing", 404, "no such directory or archive"),
        ("x", "hash1/model/config.json", 400, "a .tar.gz archive"),
        ("x", "empty", 400, "no model"),
        ("x", "wrong", 400, "max_model_len"),
        ("x", "torn", 400, "model.safetensors"),
        ("x", "hollow", 400, "\"the model cannot be loaded: the model's files lack lm_head.weight"),
        ("x", "starved", 507, "there was not enough memory"),
    ],
)
def test_what_cannot_be_loaded_is_refused_and_leaves_nothing(
    server: LiveServer, models: Path, downloads: Path, name: str, place: str, status: int, told: str
) -> None:
    before = sorted(downloads.rglob("*"))
    reply = server.http.post("/models", params={"model_name": name, "url": f"file://{models}/{place}"})
    assert (reply.status_code, told in reply.text) == (status, True), reply.text
    assert str(downloads) not in reply.text
    assert len(server.http.get("/models").json()["models"]) == 2
    assert sorted(downloads.rglob("*")) == before


def test_a_url_is_needed_and_is_of_this_machine(server: LiveServer) -> None:
    for body in ({"model_name": "x"}, {"url": "s3://bucket/x.tar.gz"}, {"url": ["x"]}, {"url": "\0"}):
        reply = server.http.post("/models", json=body)
        assert (reply.status_code, "url" in reply.json()["message"]) == (400, True)


def hostile(path: Path, kind: str) -> Path:
    info = tarfile.TarInfo("../../escaped" if kind == "traversal" else "entry")
    if kind == "header":  # Python's reader takes as much memory as a header claims and has
        info.type, info.size = tarfile.XHDTYPE, 2**29
        content: Any = open("/dev/zero", "rb")  # noqa: SIM115
    else:
        types = {"symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
        info.type, info.linkname = types.get(kind, tarfile.REGTYPE), "/etc/passwd"
        content = io.BytesIO()
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.addfile(info, content)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:60])
    return path


@pytest.mark.parametrize("kind", ["traversal", "symlink", "hardlink", "device", "cut", "header"])
def test_a_hostile_archive_is_refused_and_leaves_nothing(
    server: LiveServer, models: Path, downloads: Path, kind: str
) -> None:
    before = sorted(downloads.rglob("*"))
    reply = server.http.post("/models", json={"model_name": "x", "url": str(hostile(models / "x.tar.gz", kind))})
    assert (reply.status_code, "the archive is refused" in reply.text) == (400, True), reply.text
    assert sorted(downloads.rglob("*")) == before
    assert not list(downloads.parent.rglob("escaped"))
    assert said(ask(server, "two", SQUARE, WHAT)) == "a blue square"


def test_unloading_waits_for_what_is_being_answered_and_removes_the_archives_files(
    server: LiveServer, downloads: Path
) -> None:
    assert len(list(downloads.rglob("model.safetensors"))) == 1
    gone = process_of(server, "two", "container.models.serve")
    begun = threading.Semaphore(0)

    def stream() -> bytes:
        with server.http.stream("POST", "/models/two/invoke", json=LONG) as reply:
            assert reply.status_code == 200
            parts = reply.iter_bytes()
            data = next(parts)
            begun.release()
            return data + b"".join(parts)

    with ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(stream) for _ in range(6)]
        for _ in streams:
            assert begun.acquire(timeout=60)
        unloaded = server.http.delete("/models/two")
        assert unloaded.json() == {"status": 'Model or workflow "two" unregistered'}
        assert not gone.is_running()
        assert not list(downloads.rglob("model.safetensors"))
        for one in streams:
            events = one.result().split(b"\n\n")
            assert events[-2] == b"data: [DONE]"
            assert json.loads(events[-3].removeprefix(b"data: "))["choices"][0]["finish_reason"] == "length"
    assert ask(server, "two", "Hello!").status_code == 404
    assert said(ask(server, "one", CIRCLE, WHAT)) == "a red circle"


def test_a_request_for_a_model_that_is_being_loaded_waits_for_it(container: LiveServer, models: Path) -> None:
    assert container.http.delete("/models/two").status_code in (200, 404)
    query = {"model_name": "two", "url": str(models / "hash2/model.tar.gz"), "synchronous": "false"}
    reply = container.http.post("/models", params=query)
    assert (reply.status_code, reply.json()["status"]) == (202, 'Model "two" registration scheduled.')
    assert said(ask(container, "two", SQUARE, WHAT)) == "a blue square"


def test_an_engine_that_dies_leaves_the_other_model_alone(server: LiveServer) -> None:
    process_of(server, "two", "engine.process").kill()
    assert said(ask(server, "one", CIRCLE, WHAT)) == "a red circle"
    server.wait_for(r"replica 0 is back model=two")
    assert said(ask(server, "two", SQUARE, WHAT)) == "a blue square"


def test_a_model_whose_server_dies_is_started_by_its_next_request(server: LiveServer) -> None:
    process_of(server, "two", "container.models.serve").kill()
    server.wait_for(r"the server of model two ended with code -9")
    assert server.http.get("/models/two").json()["status"] == "IDLE"
    assert said(ask(server, "one", CIRCLE, WHAT)) == "a red circle"
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: said(ask(server, "two", SQUARE, WHAT)), range(4)))
    assert replies == ["a blue square"] * 4


def test_a_client_that_leaves_aborts_its_request(server: LiveServer) -> None:
    with server.http.stream("POST", "/models/one/invoke", json=LONG | {"max_tokens": 3000}) as reply:
        next(reply.iter_bytes())
    server.wait_for(r"container.request: request model=one .*ended=client_gone")


def test_metrics_have_the_models_name(server: LiveServer) -> None:
    for name in ("one", "two"):
        said(ask(server, name, "Hello!"))
    text = server.http.get("/metrics").text
    for name in ("one", "two"):
        assert f'lmi_requests_finished_total{{model="{name}",reason="stop"}}' in text
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))
    assert 'lmi_http_requests_total{route="/models/{model}/invoke"' in text


def test_the_document_has_the_routes(server: LiveServer) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    assert {"get", "post"} <= paths["/models"].keys()
    assert {"get", "delete"} <= paths["/models/{name}"].keys()
    assert "/models/{name}/invoke" in paths
    assert "/engine/state" not in paths
    assert server.http.get("/engine/state").status_code == 404


def test_replies_are_as_the_document_says(server: LiveServer, models: Path) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    taken = {"model_name": "one", "url": str(models / "hash1/model")}
    body = {"media_type": "application/json", "body": taken}
    for method, path, given, status in (
        ("GET", "/models", {"query": {"limit": "1"}}, 200),
        ("GET", "/models", {"query": {"limit": "x"}}, 400),
        ("POST", "/models", body, 409),
        ("POST", "/models", body | {"body": {}}, 400),
        ("GET", "/models/{name}", {"path_parameters": {"name": "one"}}, 200),
        ("GET", "/models/{name}", {"path_parameters": {"name": "none"}}, 404),
        ("DELETE", "/models/{name}", {"path_parameters": {"name": "two"}}, 200),
        ("DELETE", "/models/{name}", {"path_parameters": {"name": "none"}}, 404),
    ):
        case = schema[path][method].Case(**given)
        reply = case.call(timeout=90)
        case.validate_response(reply)
        assert reply.status_code == status, reply.text


def test_boto3_names_a_target_model_and_the_platform_makes_room(container: LiveServer, models: Path) -> None:
    for name in ("one", "two"):
        container.http.delete(f"/models/{name}")
    targets = {f"{number}.tar.gz": str(models / "hash1/model") for number in range(3)}
    with SageMakerFront(container.url, models=targets) as front:
        client = front.client(seconds=150)
        for target in ("0.tar.gz", "1.tar.gz", "0.tar.gz", "2.tar.gz"):
            reply = client.invoke_endpoint(
                EndpointName=ENDPOINT,
                TargetModel=target,
                Body=json.dumps(chat_body(CIRCLE, WHAT)),
                ContentType="application/json",
            )
            assert "a red circle" in reply["Body"].read().decode()
            assert front.passed["x-amzn-sagemaker-target-model"] == target
        assert len(front.evicted) == 1
        for name in front.loaded:
            container.http.delete(f"/models/{name}").raise_for_status()


def test_models_of_the_directory_a_key_idle_models_and_sigterm(tmp_path: Path) -> None:
    store = tmp_path / "store"
    archived(model_at(store / "shapes"))
    shutil.rmtree(store / "shapes")
    key = {"authorization": "Bearer secret"}
    (temporary := tmp_path / "tmp").mkdir()
    options = ("multi_model=true", "model_idle_timeout=2", "max_models=1", "api_key=secret", "log_format=json")
    with LiveServer(store, *options, TMPDIR=str(temporary)) as live:
        live.wait_for(r"ready after")  # The model's server and the one in front of it each say so.
        assert live.http.get("/ping").status_code == 200
        for method, path in (("GET", "/models"), ("POST", "/models"), ("DELETE", "/models/shapes")):
            assert live.http.request(method, path).status_code == 401
        assert live.http.post("/invocations", json=LONG).status_code == 401
        live.http.headers.update(key)
        assert said(live.http.post("/invocations", json=chat_body(CIRCLE, WHAT))) == "a red circle"
        reply = live.http.post("/models?url=shapes.tar.gz&model_name=more")
        assert (reply.status_code, "max_models" in reply.text) == (507, True)
        until = time.monotonic() + 60
        while live.http.get("/models/shapes").json()["status"] != "IDLE":
            assert time.monotonic() < until
        live.wait_for("model shapes had no requests")
        assert psutil.Process(live.process.pid).children() == []
        with live.http.stream("POST", "/models/shapes/invoke", json=LONG) as reply:
            parts = reply.iter_bytes()
            next(parts)
            live.process.send_signal(signal.SIGTERM)
            assert b"".join(parts).endswith(b"data: [DONE]\n\n")
        assert live.wait() == 0
    lines = [json.loads(line) for line in live.log.splitlines()]
    assert {line.get("model") for line in lines if line["message"] == "request" and line["status"] == 200} >= {"shapes"}
    until = time.monotonic() + 60
    while list(temporary.rglob("model.safetensors")):
        assert time.monotonic() < until


def test_a_directory_with_a_broken_model_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "store" / "broken").mkdir(parents=True)
    live = LiveServer(tmp_path / "store", "multi_model=true", ready=False)
    with live:
        assert live.wait() == 1
    assert "model broken: the model cannot be served: no model" in live.log
