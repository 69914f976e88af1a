"""The log of a refused request has the sentence that the client got, without anything that the client wrote."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import httpx
import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.errors import ImageError, InvalidRequest
from handlers.images import ImageProblem
from handlers.images.target import parse_target
from handlers.protocols.errors import own_words_of
from tests.support.scripted_server import ServerProcess

SENT = "xyzzy plugh7"
"""What the tests' client writes wherever it can."""


@pytest.mark.parametrize(
    ("message", "logged"),
    [
        ("image 0: its host answered with HTTP status 404", None),
        ("temperature: expected `float`, got `str`", None),
        ("the prompt has 3000 tokens, images included; this model's context is 512 tokens", None),
        ("parameters.max_new_tokens is 0; allowed: from 1", None),
        ("messages[0].role is 'xyzzy'; allowed: system, user", "messages[0].role is …; allowed: system, user"),
        ("Model or workflow not found: xyzzy/1", "Model or workflow not found: …"),
        ("https://xyzzy.example/a.png is refused", "… is refused"),
        ("the prompt holds the token id 41111111111111111", "the prompt holds the token id …"),
    ],
)
def test_only_the_programs_own_words_are_logged(message: str, logged: str | None) -> None:
    assert own_words_of(InvalidRequest(message)) == (logged or message)


@given(st.text())
def test_what_is_quoted_is_never_logged(text: str) -> None:
    message = f"the model's role is {text!r}; allowed: system"
    assert own_words_of(InvalidRequest(message)) == "the model's role is …; allowed: system"


def test_what_a_library_says_is_not_logged() -> None:
    error = InvalidRequest("the chat template refuses the messages: the model is loading")
    assert own_words_of(error) == error.message
    with pytest.raises(jinja2.UndefinedError) as caught:
        jinja2.Template("{{ the.model.is.loading }}").render()
    error = InvalidRequest(f"the chat template refuses the messages: {caught.value}")
    error.__cause__ = caught.value
    assert own_words_of(error) == "the chat template refuses the messages: …"


def test_what_our_own_cause_says_is_logged() -> None:
    with pytest.raises(ImageProblem) as caught:
        parse_target("ftp://xyzzy")
    error = ImageError(0, caught.value.reason)
    error.__cause__ = caught.value
    assert own_words_of(error) == "image 0: …: URLs are refused; send an http:, https: or data: URL"


FIELDS = (
    "model", "messages", "prompt", "inputs", "parameters", "temperature", "n", "stop", "logit_bias", "response_format",
    "tools", "tool_choice", "guided_json", "adapters", "chat_template", "bad_words", "best_of",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    SENT,
    [SENT],
    {SENT: SENT},
    {"type": SENT},
    [{"role": SENT, "content": SENT}],
    [{"role": "user", "content": [{"type": SENT}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"https://{SENT}"}}]}],
    [{"type": "function", "function": {"name": SENT}}],
    -1,
)


def test_no_refusal_brings_what_was_sent_into_the_log(tmp_path: Path) -> None:
    routes: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "{}"}]},
        "/v1/completions": {"prompt": "{}"},
        "/invocations": {"inputs": "{}"},
        "/generate": {"inputs": "{}"},
    }
    raw = [
        (b'{"xyzzy": ', "application/json"),
        (b'{"xyzzy": 1, "xyzzy": 2}', "application/json"),
        (b'{"xyzzy": 1e999}', "application/json"),
        (b"{}", "text/xyzzy"),
        (b"{}", "application/json; charset=xyzzy"),
    ]
    refused: dict[str, str] = {}
    with ServerProcess(tmp_path / "m") as server:
        server.ready()
        with httpx.Client(base_url=server.url, timeout=30) as client:
            for number, (route, field, value) in enumerate(itertools.product(routes, FIELDS, VALUES)):
                body = {**routes[route], field: value}
                if route in ("/invocations", "/generate") and field not in ("inputs", "parameters"):
                    body = {**routes[route], "parameters": {field: value}}
                reply = client.post(route, json=body, headers={"x-request-id": f"r-{number}"})
                if reply.status_code >= 400:
                    refused[f"r-{number}"] = _said(reply)
            for content, kind in raw:
                client.post("/invocations", content=content, headers={"content-type": kind})
            for path in ("/predictions/xyzzy", "/v1/models/xyzzy", "/xyzzy/plugh7"):
                client.post(path, json={})
        server.signal()
        assert server.wait() == 0
        assert len(refused) > 200
        assert not [line for line in server.log.splitlines() if "xyzzy" in line or "plugh7" in line]
    logged = dict(re.findall(r'request_id=(r-\d+) .* reason=(".*?(?<!\\)"|\S+)', server.log))
    assert logged.keys() == refused.keys()
    for number, reason in logged.items():
        said = json.loads(reason) if reason.startswith('"') else reason
        assert said.partition("…")[0].strip() in refused[number]


def _said(reply: httpx.Response) -> str:
    error = reply.json()["error"]
    return str(error if isinstance(error, str) else error["message"])
