"""Requests below HTTP's level: what parsers disagree about, what never ends, what is not HTTP at all."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import NamedTuple

from tests.attack.target import KEY

_BODY = b'{"messages":[{"role":"user","content":"hi"}],"max_tokens":2}'
_HOST = b"Host: x\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n"
_HIDDEN = b"GET /hidden-request HTTP/1.1\r\nHost: x\r\n\r\n"
"""A second request, in what belongs to the first one's body or ends its connection: answering it is smuggling."""

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")


class Trick(NamedTuple):
    """most: replies that it may get."""

    name: str
    data: bytes
    most: int = 1


def _post(headers: bytes, body: bytes = _BODY, path: bytes = b"/v1/chat/completions", end: bytes = b"\r\n") -> bytes:
    return b"POST " + path + b" HTTP/1.1" + end + _HOST + b"Content-Type: application/json\r\n" + headers + end + body


def _length(body: bytes = _BODY) -> bytes:
    return b"Content-Length: %d\r\n" % len(body)


def _chunked(body: bytes = _BODY) -> bytes:
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def tricks() -> Iterator[Trick]:
    te = b"Transfer-Encoding: chunked\r\n"
    yield Trick("length and chunks", _post(_length() + te, _chunked() + _HIDDEN))
    yield Trick("chunks and length", _post(te + b"Content-Length: 4\r\n", _chunked() + _HIDDEN))
    yield Trick("a length of 0 and chunks", _post(b"Content-Length: 0\r\n" + te, b"0\r\n\r\n" + _HIDDEN))
    yield Trick("two lengths", _post(_length() + b"Content-Length: 0\r\n", _BODY + _HIDDEN))
    yield Trick("a list of lengths", _post(b"Content-Length: 60, 0\r\n", _BODY + _HIDDEN))
    for value in (b"+60", b"-1", b"0x3c", b"60 60", b"6e1", b"", b"1" * 30, b"\xb2", b"60abc", b"60\x00"):
        yield Trick(f"a length of {value!r}", _post(b"Content-Length: " + value + b"\r\n", _BODY + _HIDDEN))
    for value in (
        b"chunked, identity", b"identity, chunked", b"xchunked", b"chunked\x0b", b"\x0bchunked", b"gzip, chunked",
        b"chunked,chunked", b"CHUNKED", b"\tchunked", b'"chunked"', b"chunked;a=b",
    ):  # fmt: skip
        yield Trick(
            f"an encoding of {value!r}",
            _post(b"Transfer-Encoding: " + value + b"\r\n", _chunked() + _HIDDEN),
            2,
        )
    for name in (
        b"Transfer-Encoding ",
        b" Transfer-Encoding",
        b"Transfer_Encoding",
        b"Transfer-Encoding\x00",
        b"X\rTransfer-Encoding",
    ):
        yield Trick(f"an encoding called {name!r}", _post(name + b": chunked\r\n" + _length(), _BODY + _HIDDEN), 2)
    yield Trick("two encodings", _post(te + b"Transfer-Encoding: identity\r\n", _chunked() + _HIDDEN))
    yield Trick("a folded header", _post(b"X-A: 1\r\n Transfer-Encoding: chunked\r\n" + _length(), _BODY))
    yield Trick("bare line feeds", _post(b"", b"").replace(b"\r\n", b"\n"))
    yield Trick("bare carriage returns", _post(_length()).replace(b"\r\n", b"\r"))
    yield Trick("a zero byte in a header", _post(b"X-A: a\x00b\r\n" + _length()))
    yield Trick("a zero byte in a name", _post(b"X\x00A: b\r\n" + _length()))
    yield Trick("a header without a name", _post(b": b\r\n" + _length()))
    yield Trick("a header without a colon", _post(b"abc\r\n" + _length()))
    yield Trick("10,000 headers", _post(b"X-A: b\r\n" * 10_000 + _length()))
    yield Trick("a header of 1 MB", _post(b"X-A: " + b"b" * 2**20 + b"\r\n" + _length()))
    yield Trick("a header's name of 1 MB", _post(b"X" * 2**20 + b": b\r\n" + _length()))
    yield Trick("a path of 1 MB", b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    yield Trick("a query of 60 kB", b"GET /metrics?" + b"name[]=a&" * 6_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    yield Trick("a method of 1 MB", b"A" * 2**20 + b" / HTTP/1.1\r\nHost: x\r\n\r\n")
    yield Trick("a huge chunk", _post(te, b"ffffffffffffffff\r\n" + _BODY))
    yield Trick("a chunk's overflow", _post(te, b"10000000000000000\r\n" + _BODY))
    yield Trick("a negative chunk", _post(te, b"-1\r\n" + _BODY))
    yield Trick("a chunk in 0x", _post(te, b"0x3c\r\n" + _BODY + b"\r\n0\r\n\r\n"))
    yield Trick("a chunk's extension of 1 MB", _post(te, b"3c;" + b"a" * 2**20 + b"\r\n" + _BODY + b"\r\n0\r\n\r\n"))
    yield Trick("a chunk without its end", _post(te, b"3c\r\n" + _BODY + b"XX0\r\n\r\n"))
    yield Trick("100,000 chunks of one byte", _post(te, b"1\r\n \r\n" * 100_000 + _chunked()[:]))
    yield Trick("1 MB of trailers", _post(te, _chunked()[:-2] + b"X-A: b\r\n" * 130_000 + b"\r\n"))
    yield Trick("a trailer that is a length", _post(te, _chunked()[:-2] + b"Content-Length: 5\r\n\r\n"))
    yield Trick("less than its length", _post(b"Content-Length: 1000\r\n"), 0)
    yield Trick("more than its length", _post(_length(), _BODY + b"more"), 2)
    yield Trick("a pipeline", (_post(_length()) * 3) + b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n", 4)
    yield Trick("a pipeline of 5,000 pings", b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n" * 5_000, 5_000)
    yield Trick("an expectation", _post(b"Expect: 100-continue\r\n" + _length()), 2)
    yield Trick("an unknown expectation", _post(b"Expect: 200-ok\r\n" + _length()), 2)
    yield Trick("an upgrade", _post(b"Connection: upgrade\r\nUpgrade: websocket\r\n" + _length()), 2)
    yield Trick(
        "an upgrade to HTTP/2",
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
    )
    yield Trick("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(60))
    yield Trick("HTTP/0.9", b"GET /ping\r\n\r\n")
    yield Trick("HTTP/1.0", b"GET /ping HTTP/1.0\r\n\r\n")
    yield Trick("HTTP/9.9", b"GET /ping HTTP/9.9\r\nHost: x\r\n\r\n")
    yield Trick("a TLS greeting", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500))
    yield Trick("SSH", b"SSH-2.0-OpenSSH_9.6\r\n")
    yield Trick("zero bytes", bytes(4096))
    yield Trick("line breaks", b"\r\n" * 50_000, 0)
    yield Trick("spaces", b" " * 4096)
    yield Trick("a method in lower case", b"get /ping HTTP/1.1\r\nHost: x\r\n\r\n")
    for method in (b"TRACE", b"CONNECT", b"OPTIONS", b"PROPFIND", b"DELETE", b"PATCH", b"PURGE", b"M-SEARCH"):
        target = b"internal:22" if method == b"CONNECT" else b"/v1/chat/completions"
        yield Trick(method.decode(), method + b" " + target + b" HTTP/1.1\r\n" + _HOST + b"\r\n")
    yield Trick("OPTIONS *", b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
    for path in (
        b"http://internal/ping", b"//internal/ping", b"/../../etc/passwd", b"/%2e%2e/%2e%2e/etc/passwd", b"/ping%00",
        b"/ping%0d%0aX-Injected:1", b"/\xff\xfe", b"/ping?\x7f", b"/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        b"/ping#a", b"/%zz", b"/adapters/..%2f..%2fetc", b"/models/../../x/invoke", b"/static/../ping", b"/ping;a=b",
        b"\\ping", b"*",
    ):  # fmt: skip
        yield Trick(f"a path of {path!r}", b"GET " + path + b" HTTP/1.1\r\n" + _HOST + b"\r\n")
    yield Trick("no host", b"GET /ping HTTP/1.1\r\n\r\n")
    yield Trick("two hosts", b"GET /ping HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
    yield Trick("an injected request id", b"GET /ping HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\x0bb\x1b[31m\r\n\r\n")
    yield Trick(
        "a key of 60 kB",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + b"k" * 60_000 + b"\r\n\r\n",
    )
    yield Trick(
        "a key of other characters",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\xe9\r\n\r\n",
    )
    yield Trick("ranges", b"GET /openapi.json HTTP/1.1\r\n" + _HOST + b"Range: bytes=" + b"0-," * 10_000 + b"\r\n\r\n")
    yield Trick("a compressed body", _post(b"Content-Encoding: gzip\r\n" + _length()))


async def send(address: tuple[str, int], trick: Trick, patience: float = 3.0) -> list[int]:
    """The statuses of the replies that came until the server closed the connection, or said no more for `patience`."""
    reader, writer = await asyncio.open_connection(*address)
    data = bytearray()
    try:
        writer.write(trick.data)
        while True:
            part = await asyncio.wait_for(reader.read(2**16), patience)
            if not part:
                break
            data += part
    except (TimeoutError, OSError):
        pass
    finally:
        writer.transport.abort()
    assert b"X-Injected" not in data
    return [int(status) for status in _STATUS.findall(bytes(data))]
