"""Stateful sessions, as SageMaker's clients open, use and close them."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest

from handlers.errors import InvalidRequest, Overloaded
from handlers.protocols.lmi.sessions import Sessions
from handlers.request import Reply
from handlers.service import Service
from tests.support.scripted import ScriptedBackend, chat, incoming, said, service
from tests.support.shapes import ROOT

OPEN = {"requestType": "NEW_SESSION"}
CLOSE = {"requestType": "CLOSE"}


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def serving(**options: Any) -> Service:
    return service(ScriptedBackend(said("a")), gates=[Sessions(**options)])


def send(server: Service, body: Any, session: str | None = None, route: str = "/invocations") -> Reply:
    headers = {} if session is None else {"x-amzn-sagemaker-session-id": session}
    return asyncio.run(server.answer(incoming(body, route, **headers)))


def opened(server: Service) -> str:
    reply = send(server, OPEN, "NEW_SESSION")
    assert reply.status == 200, reply.body
    return reply.headers["X-Amzn-SageMaker-Session-Id"].partition(";")[0]


def test_opening_tells_the_name_and_the_end_in_both_headers() -> None:
    clock = Clock()
    reply = send(serving(clock=clock, expiration=90), OPEN)
    header = reply.headers["X-Amzn-SageMaker-Session-Id"]
    assert reply.headers["X-Amzn-SageMaker-New-Session-Id"] == header
    found = re.fullmatch(r"([a-zA-Z0-9](?:-*[a-zA-Z0-9])*); Expires=(\S+)", header)
    assert found is not None, header
    end = datetime.strptime(found[2], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert end.timestamp() == clock.now + 90
    assert json.loads(reply.body) == {"result": f"Session {found[1]} created"}


def test_a_session_is_known_until_it_is_closed() -> None:
    server = serving()
    name = opened(server)
    assert name != opened(server)
    assert send(server, chat(), name).status == 200
    assert send(server, {"inputs": "hi"}, name, "/models/{model}/invoke").status == 200
    reply = send(server, CLOSE, name)
    assert json.loads(reply.body) == {"result": f"Session {name} closed"}
    assert reply.headers == {"X-Amzn-SageMaker-Closed-Session-Id": name}
    for body in (chat(), CLOSE):
        refused = send(server, body, name)
        assert refused.status == 400
        assert name in refused.body.decode()


@pytest.mark.parametrize("route", ["/invocations", "/predictions/{model}", "/models/{model}/invoke"])
def test_a_session_is_opened_on_each_of_lmis_routes(route: str) -> None:
    server = serving()
    name = json.loads(send(server, OPEN, route=route).body)["result"].split()[1]
    assert send(server, chat(), name).status == 200
    assert send(server, CLOSE, name, route).status == 200


def test_a_session_ends_in_time_however_much_it_is_used() -> None:
    clock = Clock()
    server = serving(clock=clock, expiration=100)
    first = opened(server)
    clock.now += 60
    second = opened(server)
    assert send(server, chat(), first).status == 200
    clock.now += 40
    assert send(server, chat(), first).status == 400
    assert send(server, chat(), second).status == 200


@pytest.mark.parametrize("session", ["unknown", "NEW_SESSION"])
def test_a_session_that_is_not_open_is_refused(session: str) -> None:
    assert send(serving(), chat(), session).status == 400


def test_a_server_without_sessions_answers_everyone_else() -> None:
    server = serving(enabled=False)
    assert send(server, chat()).status == 200
    for body, session in ((OPEN, None), (chat(), "x"), (CLOSE, "x")):
        refused = send(server, body, session)
        assert refused.status == 400
        assert "enable_stateful_sessions" in json.loads(refused.body).get("message", refused.body.decode())


@pytest.mark.parametrize("asked", ["OPEN", None, 5, {"a": 1}])
def test_other_request_types_are_refused(asked: Any) -> None:
    reply = send(serving(), {"requestType": asked})
    assert reply.status == 400
    assert "requestType" in json.loads(reply.body)["message"]
    assert send(serving(), CLOSE).status == 400


def test_a_body_with_a_prompt_is_answered_whatever_its_request_type() -> None:
    assert json.loads(send(serving(), {"inputs": "hi", **OPEN}).body) == {"generated_text": "a"}
    assert send(serving(), OPEN, route="/v1/chat/completions").status == 400


def test_sessions_are_bounded() -> None:
    clock = Clock()
    sessions, call = Sessions(most=2, clock=clock), incoming(OPEN, "/invocations")
    for _ in range(2):
        sessions.answer(OPEN, call)
    with pytest.raises(Overloaded):
        sessions.answer(OPEN, call)
    clock.now += 1200
    sessions.answer(OPEN, call)
    with pytest.raises(InvalidRequest):
        sessions.answer(chat(), incoming(chat(), x_amzn_sagemaker_session_id="gone"))


def test_a_start_needs_no_store_for_sessions() -> None:
    code = "import sys, container.app, container.build, container.server; assert 'boto3' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=True)
