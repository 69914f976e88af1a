"""Bodies of up to 62 MB that are made to cost much: refused early or read in bounded steps, in bounded memory."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from container import logs
from container.bodies import Bodies, Body
from handlers.errors import InvalidRequest, MalformedBody
from handlers.images import ImageProblem
from handlers.images.data_url import SLICE, decode_data_url
from handlers.protocols import body_limits
from handlers.protocols.body import read_body
from handlers.protocols.body_limits import BodyCount, counted, with_plain_slashes
from handlers.protocols.markdown_images import image_parts
from handlers.protocols.openai.messages import read_messages
from tests.attack.sending import TRIES
from tests.support.pace import too_long
from tests.support.scripted_server import ServerProcess

M = 10**6
MOST_STALL = 0.05
"""Seconds of CPU time, in the best of `TRIES`."""

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
LINES = "/invocations#application/jsonlines"
"""A route, and the body's type where that is not JSON."""


def _of_prompt(value: bytes) -> bytes:
    return b'{"max_tokens":1,"prompt":' + value + b"}"


def _of_image(url: bytes) -> bytes:
    part = b'[{"type":"image_url","image_url":{"url":"' + url + b'"}}]'
    return b'{"messages":[{"role":"user","content":' + part + b"}]}"


def _image(size: int) -> bytes:
    return b"data:image/png;base64," + base64.b64encode(b"\0" * size)


def _with(value: bytes) -> bytes:
    return b'{"prompt":"a","user":' + value + b"}"


HOSTILE: dict[str, tuple[str, Callable[[], bytes], int, str]] = {
    "token ids": (COMPLETION, lambda: _of_prompt(b"[" + b"1," * (31 * M) + b"1]"), 400, "values"),
    "keys": (
        COMPLETION,
        lambda: b"{" + b"".join(b'"k%d":1,' % n for n in range(4 * M)) + b'"prompt":"a"}',
        400,
        "allowed: at most",
    ),
    "unknown keys": (
        COMPLETION,
        lambda: b"{" + b"".join(b'"k%d":1,' % n for n in range(M // 2)) + b'"prompt":"a"}',
        400,
        "keys",
    ),
    "messages": (
        CHAT,
        lambda: b'{"messages":[' + b'{"role":"user","content":"a"},' * 300_000 + b"{}]}",
        400,
        "allowed: at most",
    ),
    "brackets": (CHAT, lambda: b'{"messages":' + b"[" * M + b"}", 400, "lists and objects"),
    "escapes": (CHAT, lambda: _of_image(b"data:image/png;base64," + b"\\u0041" * (10 * M)), 400, "escapes"),
    "a text": (COMPLETION, lambda: _of_prompt(b'"' + b"a" * (60 * M) + b'"'), 400, "bytes in one text"),
    "an allowed text": (COMPLETION, lambda: _of_prompt(b'"' + b"a" * (33 * M) + b'"'), 200, ""),
    "allowed texts": (COMPLETION, lambda: _of_prompt(b"[" + b'"%b",' % (b"a" * M) * 60 + b'"a"]'), 200, ""),
    "a text and one smile": (
        COMPLETION,
        lambda: _of_prompt(b'"' + b"a" * (33 * M) + "\N{SMILING FACE WITH SMILING EYES}".encode() + b'"'),
        400,
        "more than ASCII",
    ),
    "UTF-8 that ends badly": (COMPLETION, lambda: _of_prompt(b'"' + b"a" * (33 * M) + b'\xff"'), 400, ""),
    "texts with an escape": (
        COMPLETION,
        lambda: _of_prompt(b'["' + b"a" * (20 * M) + b'\\n","' + b"a" * (20 * M) + b'\\n"]'),
        400,
        "texts that hold escapes",
    ),
    "white space": (COMPLETION, lambda: _of_prompt(b" " * (60 * M) + b'"a"'), 400, "white space"),
    "a number": (COMPLETION, lambda: _of_prompt(b"1" * (10 * M)), 400, "out of range"),
    "a key": (COMPLETION, lambda: b'{"' + b"a" * (10 * M) + b'":1,"prompt":"a"}', 200, ""),
    "a wrong word": (
        CHAT,
        lambda: b'{"messages":[{"role":"user","content":"a"}],"truncation_side":"' + b"a " * (10 * M) + b'"}',
        400,
        "truncation_side",
    ),
    "percent": (CHAT, lambda: _of_image(b"data:image/png," + b"%41" * (20 * M)), 400, "bytes in one text"),
    "allowed percent": (CHAT, lambda: _of_image(b"data:image/png," + b"%41" * (11 * M)), 400, "image 0"),
    "base64 in percent": (CHAT, lambda: _of_image(b"data:image/png;base64," + b"%41" * (11 * M)), 400, ""),
    "allowed token ids": (COMPLETION, lambda: _of_prompt(b"[" + b"1," * 520_000 + b"1]"), 200, ""),
    "allowed lists": (COMPLETION, lambda: _with(b"[" + b"[]," * 65_000 + b"1]"), 200, ""),
    "allowed keys": (
        COMPLETION,
        lambda: _with(b"{" + b"".join(b'"k%d":1,' % n for n in range(130_000)) + b'"k":1}'),
        200,
        "",
    ),
    "allowed escapes": (
        COMPLETION,
        lambda: _of_prompt(b'"' + (b"a" * 29 + b"\\n") * 1_040_000 + b'"'),
        200,
        "",
    ),
    "escaped slashes": (COMPLETION, lambda: _of_prompt(b'"' + b"\\/" * (16 * M) + b'"'), 200, ""),
    "a text and one escaped slash": (
        COMPLETION,
        lambda: _of_prompt(b'"' + b"a" * (33 * M) + b'\\/"'),
        200,
        "",
    ),
    "an allowed text and one smile": (
        COMPLETION,
        lambda: _of_prompt(b'"' + b"a" * (12 * M) + "\N{SMILING FACE WITH SMILING EYES}".encode() + b'"'),
        200,
        "",
    ),
    "many images": (
        CHAT,
        lambda: (
            b'{"messages":[{"role":"user","content":['
            + b",".join([b'{"type":"image_url","image_url":"' + _image(5 * M) + b'"}'] * 9)
            + b"]}]}"
        ),
        400,
        "holds 9 images",
    ),
    "an image in Markdown": (
        "/invocations",
        lambda: b'{"inputs":"![](' + _image(20 * M) + b')"}',
        400,
        "image 0",
    ),
    "Markdown": ("/invocations", lambda: b'{"inputs":"' + b"![" * (10 * M) + b'"}', 200, ""),
    "empty lines": (LINES, lambda: b"\n" * (62 * M), 400, "lines"),
    "a line of spaces": (LINES, lambda: b" " * (62 * M), 200, "outside of texts"),
    "lines with mistakes": (LINES, lambda: (b'{"user":"' + b"a" * 6180 + b'"}\n') * 10_000, 200, "neither"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = tmp_path_factory.mktemp("bodies") / "model"
    with ServerProcess(model, module="tests.attack.probed_server") as server:
        yield server.ready()


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_body_takes_three_times_its_memory_or_holds_the_event_loop_up(server: ServerProcess, kind: str) -> None:
    route, make, status, told = HOSTILE[kind]
    body = make()
    for left in reversed(range(TRIES)):
        _longest_stall(server)
        before = _resident(server.pid)
        Path(f"/proc/{server.pid}/clear_refs").write_text("5")  # the highest size begins anew
        got, reply = _post(server, route, body)
        grown = _resident(server.pid, "VmHWM") - before
        stall = _longest_stall(server)
        print(f"{kind}: {len(body)} bytes, status {got}, {grown / M:.0f} MB, stall {stall} ms of CPU time")
        assert got == status, reply[:300]
        assert told in reply, reply[:300]
        assert len(reply) < 2000 or status == 200
        assert grown <= 3 * len(body) + 50 * M
        if not too_long(stall / 1000, MOST_STALL):
            return
        assert left, f"the event loop stopped for {stall} ms of CPU time"


def _post(server: ServerProcess, route: str, body: bytes) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    try:
        path, _, kind = route.partition("#")
        connection.request("POST", path, body, {"content-type": kind or "application/json"})
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


def test_what_was_loaded_is_not_looked_through_for_waste_again(server: ServerProcess) -> None:
    assert _told(server, "frozen") > 10_000


def _longest_stall(server: ServerProcess) -> int:
    return _told(server, "stalls")


def _told(server: ServerProcess, what: str) -> int:
    status, reply = _post(server, COMPLETION, json.dumps({"prompt": json.dumps({what: True})}).encode())
    assert status == 200, reply
    return int(json.loads(reply)["choices"][0]["text"])


def _resident(pid: int, what: str = "VmRSS") -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_a_large_body_is_not_joined_on_the_event_loop() -> None:
    parts = [b"a" * 2**18] * 200
    size = len(parts) * 2**18
    bodies = Bodies()
    bodies.limit = 2 * size

    async def read() -> float:
        """CPU time of the event loop's thread."""
        left = iter(range(len(parts)))

        async def receive() -> dict[str, Any]:
            number = next(left)
            return {"body": parts[number], "more_body": number < len(parts) - 1, "type": "http.request"}

        body = Body(bodies, {}, size, 60)
        began = time.thread_time()
        whole = await body.read(receive)
        spent = time.thread_time() - began
        body.release()
        assert len(whole) == size
        return spent

    def join() -> float:
        began = time.thread_time()
        whole = b"".join(parts)
        spent = time.thread_time() - began
        assert len(whole) == size
        return spent

    assert min(asyncio.run(read()) for _ in range(3)) < min(join() for _ in range(3)) / 2
    assert bodies.held == 0


# Counts


def _counted_slowly(body: bytes) -> BodyCount:
    count, inside, at = BodyCount(), False, 0
    while at < len(body):
        letter = body[at : at + 1]
        if inside and letter == b"\\":
            slash = body[at + 1 : at + 2] == b"/"
            count.slashes += slash
            count.escapes += 0 if slash else 1 + (body[at + 1 : at + 2] == b"\\")
            at += 1
        elif letter == b'"':
            inside = not inside
        elif not inside:
            count.containers += letter in b"[{"
            count.values += letter in b"[{,"
            count.keys += letter == b":"
        at += 1
    return count


@pytest.mark.parametrize("size", [64, 192, body_limits.SLICE_BYTES])
def test_what_a_body_holds_is_counted_across_any_border(size: int) -> None:
    draw = random.Random(size)
    for _ in range(500):
        text = "".join(draw.choices(['"', "\\", ",", "[", "{", ":", "a", "é", "/"], k=draw.randint(0, 300)))
        value: Any = {"a": text, "b": [text, {",": [1, 2, "\\"]}]}
        body = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode()
        if draw.random() < 0.5:
            body = body.replace(b"/", b"\\/")
        found, expected = list(counted(body, size))[-1], _counted_slowly(body)
        for counter in ("values", "keys", "containers", "escapes", "slashes"):
            assert getattr(found, counter) == getattr(expected, counter), counter
        assert json.loads(bytes(with_plain_slashes(body, size))) == value


def test_commas_brackets_and_colons_in_a_text_count_for_nothing() -> None:
    text = ", [ { : ] }" * M
    assert read_body(json.dumps({"prompt": text}).encode(), {})["prompt"] == text


def test_a_large_image_beside_text_beyond_ascii_is_read() -> None:
    image = "data:image/png;base64," + "A" * (28 * M)
    content = [{"text": "où?"}, {"url": image}, {"text": "où?"}]
    assert read_body(json.dumps({"c": content}, ensure_ascii=False).encode(), {})["c"] == content
    assert read_body(json.dumps({"c": content}).encode(), {})["c"] == content


def test_large_images_whose_slashes_are_escaped_are_read() -> None:
    """As PHP's json_encode writes them: two of 13 MB."""
    image = "data:image/png;base64," + ("A" * 63 + "/") * 270_000
    text = json.dumps({"c": [image, image, "\\/"]}).replace("/", "\\/")
    assert read_body(text.encode(), {})["c"] == [image, image, "\\/"]
    with pytest.raises(MalformedBody, match=r"not valid JSON: invalid character$"):
        read_body(text.replace("[", "[\\/", 1).encode(), {})


def test_a_prompt_that_fills_a_long_context_may_be_written_in_escapes() -> None:
    text = "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 1_200_000
    assert read_body(json.dumps({"prompt": text}).encode(), {}, 2**20)["prompt"] == text
    with pytest.raises(MalformedBody, match=r"escapes .* at most 1048576"):
        read_body(json.dumps({"prompt": text}).encode(), {}, 4096)
    with pytest.raises(MalformedBody, match=r"escapes .* at most 4194304"):
        read_body(json.dumps({"prompt": "\n" * 5_000_000}).encode(), {}, 2**24)


def test_as_many_token_ids_as_the_context_has_room_for_several_times_are_read() -> None:
    def body(count: int) -> bytes:
        return b'{"prompt":[' + b"1," * (count - 1) + b"1]}"

    assert len(read_body(body(500_000), {}, 4096)["prompt"]) == 500_000
    assert len(read_body(body(1_000_000), {}, 2**20)["prompt"]) == 1_000_000
    for most, context in ((2**19, 4096), (2**20, 2**24)):
        with pytest.raises(InvalidRequest, match=rf"values .* allowed: at most {most}"):
            read_body(body(2**20 + 1), {}, context)


def test_an_image_of_5_mib_costs_little_more_than_its_parse() -> None:
    body = _of_image(b"data:image/png;base64," + base64.b64encode(os.urandom(5 * 2**20)))

    def once(work: Callable[[], Any]) -> float:
        began = time.thread_time()
        work()
        return time.thread_time() - began

    parse = min(once(lambda: msgspec.json.decode(body)) for _ in range(5))
    whole = min(once(lambda: read_messages(read_body(body, {})["messages"])) for _ in range(5))
    print(f"{whole / parse:.1f} times a parse of {parse * 1000:.1f} ms")
    assert whole < 10 * parse


def test_messages_and_parts_are_bounded_by_the_context() -> None:
    message: dict[str, Any] = {"role": "user", "content": "a"}
    assert len(read_messages([message] * 4096)) == 4096
    assert len(read_messages([message] * 5000, context=5000)) == 5000
    with pytest.raises(InvalidRequest, match=r"4097 messages.* at most 4096"):
        read_messages([message] * 4097)
    message["content"] = ["a"] * 2049
    with pytest.raises(InvalidRequest, match=r"4098 parts.* at most 4096"):
        read_messages([message] * 2)


# Images


def test_a_long_url_is_decoded_with_twice_its_images_memory_at_most() -> None:
    data = os.urandom(3 * M)
    coded = base64.urlsafe_b64encode(data).decode()
    wrapped = "\r\n".join(coded[at : at + 76] for at in range(0, len(coded), 76))
    quoted = "".join(f"%{ord(letter):02x}" for letter in coded[:400_000]) + coded[400_000:]
    for size in (4, 5, SLICE):
        for text in (coded, wrapped, quoted) if size > 5 else (coded[:400], wrapped[:400], quoted[:396]):
            found = decode_data_url(f"data:;base64,{text}", 4 * M, size)
            assert data.startswith(found)
            assert size <= 5 or found == data
    with pytest.raises(ImageProblem, match="more than 1000 bytes"):
        decode_data_url("data:," + "%41" * 1001, 1000)
    with pytest.raises(ImageProblem, match="more than 1000 bytes"):
        decode_data_url("data:;base64," + "QUFB" * 334, 1000)


def test_images_are_found_across_the_windows_of_a_long_text() -> None:
    for before in range(2**17 - 30, 2**17 + 3):
        parts = image_parts("a" * before + "![some](https://x/(1).png) b")
        assert len(parts) == 3, before
    long = "data:image/png;base64," + "A" * (3 * M)
    assert [getattr(part, "url", None) for part in image_parts(f"![]({long})")] == [long]
    assert len(image_parts(f"![]({long} A)")) == 1


# The log


def test_a_long_body_is_logged_without_its_links_and_with_what_stands_behind_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "container.prompts")
    body = b'{"inputs":"![](data:image/png;base64,' + b"A" * (3 * M) + b') what?","n":[1]}'
    logs.log_prompt("id", body)
    logs.log_prompt("id", b'{"inputs":"' + b"a " * M + b'"}')
    logs.log_prompt("id", b"{" + b'"a":[' * 900 + b"]" * 900)
    logs.log_prompt("id", b'{"a":[' + b"[]," * M + b"1]}")
    shown = [record.facts["body"] for record in caplog.records]  # type: ignore[attr-defined]
    assert shown[0] == '{"inputs": "![]([link]) what?", "n": [1]}'
    assert len(shown[1]) == 32_768
    assert "no JSON" in shown[2]
    assert "hold too much" in shown[3]


@pytest.mark.parametrize("window", [16, 40, 2**16])
def test_links_are_removed_across_any_border(window: int) -> None:
    draw = random.Random(window)
    words = ["data:", "http://x", "https:", "s3:", "a", "b c", ")", "'", " ", "dat"]
    for _ in range(500):
        text = "".join(draw.choices(words, k=draw.randint(0, 40)))
        assert logs.without_links(text, window) == logs.LINK.sub("[link]", text)
