"""Every kind of Unicode, and images, come out whole, wherever their bytes are cut on the way in and out."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.client
import io
import json
import re
import socket
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.support.live import LiveServer
from tests.support.scripted_server import ServerProcess

KINDS = {
    "controls": "".join(map(chr, range(32))) + "\x7f.",
    "quotes": "\"'\\`</script>\\u0041\\\\ {}[]",
    "framing": "data: x\n\n[DONE]\r\n: keep-alive\r\n\r\n0\r\n\r\nevent: y",
    "latin": "Ünïcödé ß ÿ \x80\x9f",
    "combined": unicodedata.normalize("NFD", "Ångström é ệ") + unicodedata.normalize("NFC", "Ångström é ệ"),
    "east asian": "東京の猫、漢字。한국어 ﾊﾝｶｸ ＡＢＣ",
    "right to left": "שלום \u202eعربى\u202c \u200fx\u2066y\u2069",
    "clusters": "क्षत्रिय ไทยน้ำ မြန်မာ",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈👋🏽🇨🇭1️⃣🐻",
    "astral": "𝔘𓀀𐍈\U0002070e\U0010ffff\U000e0041",
    "noncharacters": "\ufffe\uffff\ufdd0\U0001fffe",
    "private": "\ue000\ue0ff\uf8ff\U000f0000",
    "blanks": "\ufeffa\u2028b\u2029c\u0085d\u200be\u00adf\u3000g\u00a0 \t h",
    "replacement": "\ufffd a \ufffd.",
    "markdown": "![a](x) ![](ftp://h/p) [b](https://h/p) \\",
}

PLANES = "".join(chr(c) for c in range(0, 0x110000, 0xD3) if not 0xD800 <= c < 0xE000)
"""Five thousand characters from everywhere."""


def png(size: int = 1) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((size, size), 200).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


# Over the wire, to a backend that says what it was told


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("model") / "scripted") as server:
        yield server.ready()


def order(text: str, image: bytes, *, ascii_only: bool = False, **fields: Any) -> bytes:
    """A chat with an image, whose answer is `text` and the image's digest, twice."""
    said = json.dumps({"say": text, "digests": True, "tokens": 2}, ensure_ascii=ascii_only)
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": said}]
    body = {"messages": [{"role": "user", "content": parts}], **fields}
    return json.dumps(body, ensure_ascii=ascii_only).encode()


def expected(text: str, image: bytes) -> str:
    return f"{text} {hashlib.sha256(image).hexdigest()}" * 2


def sent(wire: ServerProcess, pieces: Sequence[bytes]) -> str:
    """A body in chunks, each in a segment of its own, and the answer to it."""
    connection = http.client.HTTPConnection("127.0.0.1", wire.port, timeout=30)
    try:
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return asked(connection, pieces)
    finally:
        connection.close()


def asked(connection: http.client.HTTPConnection, pieces: Sequence[bytes]) -> str:
    headers = {"content-type": "application/json", "transfer-encoding": "chunked"}
    connection.request("POST", "/v1/chat/completions", iter(pieces), headers, encode_chunked=True)
    reply = connection.getresponse()
    body = reply.read()
    assert reply.status == 200, body
    content = json.loads(body)["choices"][0]["message"]["content"]
    assert isinstance(content, str)
    return content


def test_a_body_cut_at_any_byte_comes_whole(wire: ServerProcess) -> None:
    text, image = 'é漢🐻\u2028"\\\x00\U0010ffff', png()
    want = expected(text, image)
    connection = http.client.HTTPConnection("127.0.0.1", wire.port, timeout=30)
    for ascii_only in (False, True):
        body = order(text, image, ascii_only=ascii_only)
        for cut in range(1, len(body)):
            assert asked(connection, [body[:cut], body[cut:]]) == want, cut
    connection.close()


def test_a_body_of_single_bytes_comes_whole(wire: ServerProcess) -> None:
    for text in KINDS.values():
        image = png(2)
        body = order(text, image)
        assert sent(wire, [body[i : i + 1] for i in range(len(body))]) == expected(text, image)


def test_a_request_of_single_bytes_comes_whole(wire: ServerProcess) -> None:
    """The head, too; and the reply is read a byte at a time."""
    image = png()
    body = order(KINDS["emoji"], image, stream=True)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", wire.port), timeout=30) as plug:
        plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in head.encode() + body:
            plug.sendall(bytes([byte]))
        reply = b""
        while byte_read := plug.recv(1):
            reply += byte_read
    headers, _, framed = reply.partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 200")
    assert joined(unchunked(framed)) == expected(KINDS["emoji"], image)


def test_characters_from_all_planes_and_a_large_image_come_whole(wire: ServerProcess) -> None:
    image = png(1000)
    assert len(image) > 2**20
    for ascii_only in (False, True):
        body = order(PLANES, image, ascii_only=ascii_only)
        size = 65521
        pieces = [body[i : i + size] for i in range(0, len(body), size)]
        assert sent(wire, pieces) == expected(PLANES, image)


def unchunked(framed: bytes) -> bytes:
    """The body of a reply in chunks."""
    body = b""
    while framed:
        size, _, framed = framed.partition(b"\r\n")
        length = int(size, 16)
        body, framed = body + framed[:length], framed[length + 2 :]
        if not length:
            break
    return body


def joined(stream: bytes) -> str:
    """What the events of a chat add up to. Each event is whole UTF-8 by itself."""
    *events, done, rest = stream.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    assert all(re.match(rb"data: \{[^\n\r]*\}\Z", event) for event in events)
    chunks = [json.loads(event[6:].decode()) for event in events]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


# Through a real tokenizer, engine and detokenizer, whose tokens are pieces of characters


@pytest.fixture(scope="module")
def live(shapes_server: LiveServer) -> LiveServer:
    return shapes_server


def forced(text: str) -> dict[str, Any]:
    """For an answer that can only be `text`, in which tokens end within characters."""
    return {"structured_outputs": {"choice": [text]}, "temperature": 0}


async def apis(client: httpx.AsyncClient, text: str, image: str) -> dict[str, str]:
    """The answer in each API's whole and streamed words; every prompt holds the text, too."""
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": text}]
    chat = {"messages": [{"role": "user", "content": content}], "max_tokens": 200, **forced(text)}
    prompt = f"![]({image}){text}"
    plain = {"prompt": prompt, "max_tokens": 200, "echo": True, "logprobs": 0, **forced(text)}
    parameters = {"max_new_tokens": 200, "guided_choice": [text]}
    grammar = {"max_new_tokens": 200, "details": True, "grammar": {"type": "regex", "value": escaped(text)}}
    asked = {
        "chat": ("/v1/chat/completions", chat),
        "chat streamed": ("/v1/chat/completions", {**chat, "stream": True}),
        "completion": ("/v1/completions", plain),
        "completion streamed": ("/v1/completions", {**plain, "stream": True}),
        "lmi": ("/invocations", {"inputs": prompt, "parameters": parameters}),
        "lmi streamed": ("/invocations", {"inputs": prompt, "parameters": parameters, "stream": True}),
        "tgi": ("/generate", {"inputs": prompt, "parameters": grammar}),
        "tgi streamed": ("/generate_stream", {"inputs": prompt, "parameters": grammar}),
    }
    replies = await asyncio.gather(*(client.post(path, json=body) for path, body in asked.values()))
    found = {}
    for name, reply in zip(asked, replies, strict=True):
        assert reply.status_code == 200, (name, text, reply.text)
        found[name] = written(name, reply.content.decode("utf-8", "strict"))
        if name.startswith("completion"):
            assert found[name].startswith(prompt)
            found[name] = found[name].removeprefix(prompt)
    return found


def written(name: str, reply: str) -> str:
    if not name.endswith("streamed"):
        body = json.loads(reply)
        if "generated_text" in body:
            return str(body["generated_text"])
        choice = body["choices"][0]
        return str(choice["message"]["content"] if "message" in choice else choice["text"])
    if name.startswith("chat"):
        return joined(reply.encode())
    if name.startswith("lmi"):
        lines = [json.loads(line) for line in reply.split("\n") if line]
        texts = "".join(line["token"]["text"] for line in lines)
        assert texts == lines[-1]["generated_text"]
        return texts
    events = [json.loads(event[5:]) for event in reply.split("\n\n") if event and event != "data: [DONE]"]
    if name.startswith("completion"):
        return "".join(choice["text"] for event in events for choice in event["choices"])
    texts = "".join(event["token"]["text"] for event in events if not event["token"]["special"])
    assert texts == events[-1]["generated_text"]
    return texts


def escaped(text: str) -> str:
    """A regular expression for the text, in the words that all engines know."""
    return "".join(f"\\{c}" if c in r"\.+*?()|[]{}^$-" else f"\\x{{{ord(c):x}}}" for c in text)


def test_every_kind_of_text_is_answered_whole_in_every_api(live: LiveServer) -> None:
    async def ask() -> None:
        async with httpx.AsyncClient(base_url=live.url, timeout=120) as client:
            image = data_url(png(64))
            asking = [apis(client, text, image) for text in KINDS.values()]
            for (kind, text), found in zip(KINDS.items(), await asyncio.gather(*asking), strict=True):
                for name, got in found.items():
                    assert got == text, (kind, name)

    asyncio.run(ask())


def test_tokens_of_any_text_are_that_text_again(live: LiveServer) -> None:
    for text in (*KINDS.values(), PLANES):
        for special in (False, True):
            body = {"prompt": text, "add_special_tokens": special}
            tokens = live.http.post("/tokenize", json=body).json()["tokens"]
            back = live.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
            assert back.removeprefix("<s>" if special else "") == text
        pieces = live.http.post("/tokenize", json={"inputs": text}).json()
        raw = text.encode()
        assert all(raw[p["start"] : p["stop"]].decode() == p["text"] for p in pieces[1:])


def test_a_stop_string_is_found_wherever_its_bytes_are_cut(live: LiveServer) -> None:
    text = "one 🐻 two 漢字 three"
    for stop in ("🐻", "漢字", "字", " t", "wo 漢"):
        for stream in (False, True):
            body = {
                "messages": [{"role": "user", "content": "x"}], "stop": stop, "stream": stream,
                "max_tokens": 100, **forced(text),
            }  # fmt: skip
            reply = live.http.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            assert written("chat streamed" if stream else "chat", reply.text) == text.partition(stop)[0]
