"""The server's own document: it has every route, and every route keeps to it whatever schemathesis sends."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from openapi_spec_validator import validate
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from container.app import ONE, SEVERAL, Router
from container.openapi import document
from container.routes import ROUTES
from handlers.protocols.openai.bodies import ChatBody, CompletionBody
from handlers.protocols.tgi.requests import TgiParameters
from tests.support.live import LiveServer
from tests.support.shapes import SHAPES

EXAMPLES = 6
"""Requests for each operation and kind of body."""

IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)

load_all_checks()
_CHECKS = [
    check
    for check in CHECKS.get_all()
    if check.__name__
    in {
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "response_headers_conformance",
    }
]


@schemathesis.deserializer("application/jsonlines")
def _lines(context: Any, response: Any) -> list[Any]:
    return [json.loads(line) for line in response.content.splitlines()]


def described(router: Router = ONE) -> dict[str, Any]:
    found = json.loads(document(router.routes))
    assert isinstance(found, dict)
    return found


# The document


@pytest.mark.parametrize("router", [ONE, SEVERAL], ids=["one", "several"])
def test_the_document_is_valid_openapi(router: Router) -> None:
    validate(described(router))
    assert described(router)["openapi"].startswith("3.1.")


@pytest.mark.parametrize("router", [ONE, SEVERAL], ids=["one", "several"])
def test_every_route_is_in_the_document_with_all_its_methods(router: Router) -> None:
    paths = described(router)["paths"]
    routes: dict[str, set[str]] = {}
    for route in router.routes:
        path = route.path
        routes.setdefault(path, set()).update(method.lower() for method in route.methods)
    assert {path: set(operations) for path, operations in paths.items()} == routes
    for path in (
        "/ping",
        "/invocations",
        "/v1/chat/completions",
        "/v1/completions",
        "/generate",
        "/openapi.json",
    ):
        assert path in paths


def test_every_field_that_is_read_is_described() -> None:
    schemas = described()["components"]["schemas"]
    for name, shape in (
        ("ChatBody", ChatBody),
        ("CompletionBody", CompletionBody),
        ("TgiParameters", TgiParameters),
    ):
        assert schemas[name]["properties"].keys() == {f.name for f in msgspec.structs.fields(shape)}
    assert schemas["CompletionBody"]["properties"]["temperature"]["anyOf"][0]["maximum"] == 100
    assert schemas["CompletionBody"]["properties"]["prompt"]["anyOf"][1]["minItems"] == 1


def test_every_schema_is_named_somewhere() -> None:
    text = document(ONE.routes).decode()
    for name in described()["components"]["schemas"]:
        assert f'"#/components/schemas/{name}"' in text, name


def test_only_what_the_key_guards_asks_for_the_key() -> None:
    for operations in described()["paths"].values():
        for operation in operations.values():
            assert ("security" in operation) == ("401" in operation["responses"])


# A live server


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """Small enough that no body can ask for much work."""
    limits = ("max_model_len=128", "max_rolling_batch_size=8", "job_queue_size=8", "predict_timeout=60")
    with LiveServer(SHAPES, *limits) as live:
        yield live


@pytest.fixture(scope="module")
def schema(server: LiveServer) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def operation(schema: schemathesis.BaseSchema, method: str, path: str) -> Any:
    return schema[path][method]


def checked(case: Case) -> requests.Response:
    """Sent to the server; its reply is held to the document."""
    reply = case.call(timeout=90)
    case.validate_response(reply, checks=_CHECKS)
    return reply  # type: ignore[return-value]


CHAT = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}, "What?"]}]}
PROMPT = {"prompt": f"![]({IMAGE})What is this?", "max_tokens": 6}
INPUTS = {"inputs": f"![]({IMAGE})What is this?", "parameters": {"max_new_tokens": 6}}
ALL = {
    "n": 2,
    "top_logprobs": 2,
    "logprobs": True,
    "return_token_ids": True,
    "max_tokens": 6,
    "temperature": 1,
}
LEGACY = {"n": 2, "logprobs": 2, "echo": True, "return_token_ids": True, "max_tokens": 6, "temperature": 1}
USAGE = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
DETAILS = {"max_new_tokens": 6, "details": True, "top_n_tokens": 2, "do_sample": True, "seed": 1}
SEVERAL = {"max_new_tokens": 6, "details": True, "do_sample": True, "best_of": 2}

RIGHT: list[tuple[str, str, dict[str, Any] | None]] = [
    ("get", "/ping", None),
    ("post", "/ping", None),
    ("get", "/health", None),
    ("get", "/", None),
    ("get", "/metrics", None),
    ("get", "/server/metrics", None),
    ("get", "/version", None),
    ("get", "/info", None),
    ("get", "/openapi.json", None),
    ("get", "/engine/state", None),
    ("get", "/execution-parameters", None),
    ("get", "/engine/model", None),
    ("get", "/page", None),
    ("get", "/page/{name}", None),
    ("get", "/v1/models", None),
    ("get", "/v1/models/{name}", None),
    ("post", "/v1/chat/completions", CHAT),
    ("post", "/v1/chat/completions", {**CHAT, **ALL, "prompt_logprobs": 1}),
    ("post", "/v1/chat/completions", {**CHAT, **ALL, **USAGE}),
    ("post", "/v1/completions", PROMPT),
    ("post", "/v1/completions", {**PROMPT, **LEGACY, "prompt_logprobs": 1}),
    ("post", "/v1/completions", {**PROMPT, **LEGACY, **USAGE, "prompt": ["a", "b"]}),
    ("post", "/v1/completions", {"prompt": [[5, 6], [7]], "best_of": 2, "max_tokens": None}),
    ("post", "/invocations", CHAT),
    ("post", "/invocations", {**CHAT, "stream": True}),
    ("post", "/invocations", PROMPT),
    ("post", "/invocations", INPUTS),
    ("post", "/invocations", {**INPUTS, "inputs": ["a", "b"]}),
    ("post", "/invocations", {**INPUTS, "stream": True}),
    ("post", "/invocations", {**INPUTS, "parameters": {**DETAILS, "decoder_input_details": True}}),
    ("post", "/invocations", {**INPUTS, "parameters": DETAILS, "stream": True}),
    ("post", "/invocations", {**INPUTS, "parameters": SEVERAL}),
    ("post", "/predictions/{name}", INPUTS),
    ("post", "/models/{name}/invoke", CHAT),
    ("post", "/", INPUTS),
    ("post", "/", {**INPUTS, "stream": True}),
    ("post", "/v1", INPUTS),
    ("post", "/generate", INPUTS),
    ("post", "/generate", {**INPUTS, "parameters": {**DETAILS, "decoder_input_details": True}}),
    ("post", "/generate", {**INPUTS, "parameters": SEVERAL}),
    ("post", "/generate_stream", {**INPUTS, "parameters": DETAILS}),
    ("post", "/tokenize", {"inputs": "a"}),
    ("post", "/tokenize", {"prompt": "a", "return_token_strs": True}),
    ("post", "/tokenize", CHAT),
    ("post", "/chat_tokenize", CHAT),
    ("post", "/detokenize", {"tokens": [5, 6]}),
]
"""What is asked rightly on each route, whole and streamed: none of these may be refused."""


@pytest.mark.parametrize(("method", "path", "body"), RIGHT, ids=lambda value: None)
def test_right_requests_are_answered_as_the_document_says(
    schema: schemathesis.BaseSchema, method: str, path: str, body: dict[str, Any] | None
) -> None:
    given_body = {} if body is None else {"body": body, "media_type": "application/json"}
    named = {"name": "page.js" if path.startswith("/page/") else "shapes"} if "{name}" in path else None
    case = operation(schema, method, path).Case(path_parameters=named, **given_body)
    reply = checked(case)
    assert reply.status_code == 200, reply.text


def test_right_requests_cover_every_route() -> None:
    reached = {(path, method) for method, path, _ in RIGHT}
    for route in ROUTES:
        path = route.path
        if route.action != "adapters":  # which test_adapters_api.py asks: they need a backend that has some
            assert {(path, method.lower()) for method in route.methods} - {(path, "head")} <= reached


def test_sessions_are_answered_as_the_document_says(schema: schemathesis.BaseSchema) -> None:
    body = {"requestType": "CLOSE"}
    case = operation(schema, "post", "/invocations").Case(body=body, media_type="application/json")
    assert checked(case).status_code == 400


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
def test_whatever_is_sent_the_server_keeps_to_its_document(
    schema: schemathesis.BaseSchema, mode: GenerationMode
) -> None:
    statuses: Counter[int] = Counter()

    for result in schema.get_all_operations():
        found = result.ok()
        if mode is GenerationMode.NEGATIVE and not list(found.body):
            continue

        @seed(20261121)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=found.as_strategy(generation_mode=mode), found_by_name=st.booleans())
        def ask(case: Case, found_by_name: bool) -> None:
            if found_by_name:  # names that are made up are all refused, before anything else is looked at
                _name_rightly(case)
            statuses[checked(case).status_code] += 1

        ask()
    assert statuses[200] > (20 if mode is GenerationMode.POSITIVE else 0)
    assert statuses.keys() <= {200, 400, 404, 413, 415, 422}, statuses


def _name_rightly(case: Case) -> None:
    if case.path_parameters:
        case.path_parameters |= {"name": "shapes"} if "name" in case.path_parameters else {}
    case.query = {}
    case.headers = {}


def test_other_methods_are_refused_with_those_that_there_are(server: LiveServer) -> None:
    allowed: dict[str, set[str]] = {}
    for route in ROUTES:
        path = route.path
        allowed.setdefault(path.replace("{name}", "shapes"), set()).update(route.methods)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for path, methods in allowed.items():
            for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - methods:
                reply = client.request(method, path)
                assert reply.status_code == 405, (method, path, reply.text)
                assert {one.strip() for one in reply.headers["allow"].split(",")} == methods
