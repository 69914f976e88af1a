"""Fetching images from real sockets on this machine, whose servers do what hostile servers do."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import os
import socket
import ssl
import sys
import threading
import time
import zlib
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from handlers.errors import ImageError, ImageFetchFailed, ImageFetchTimeout, ImageTooLarge
from handlers.request import ImagePart
from tests.support.image_host import (
    IMAGE,
    OK,
    Host,
    Serve,
    opened,
    redirect,
    replying,
    serve_image,
    silence,
)
from tests.support.tls import certificate


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Runs a coroutine on both event loops; what the loop was left to complain about fails the test."""

    def go(coroutine: Coroutine[Any, Any, Any]) -> Any:
        complaints: list[dict[str, Any]] = []

        def note(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            if "incoming connection" not in context["message"]:  # the server's, when a handshake is given up
                complaints.append(context)

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.get_loop().set_exception_handler(note)
            result = runner.run(coroutine)
        assert not complaints
        return result

    return go


def flood(head: bytes, piece: bytes) -> Serve:
    """Sends `piece` for as long as anyone reads."""

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(piece * (16_384 // len(piece)))
            await writer.drain()
            await asyncio.sleep(0)

    return serve


async def load(url: str, **limits: Any) -> ImagePart:
    loader = opened(**limits)
    part = ImagePart(url)
    try:
        await loader.load([part])
    finally:
        await loader.aclose()
    assert part.loaded is not None
    assert part.loaded.image.size == (40, 30)
    return part


async def refused(url: str, **limits: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        await load(url, **limits)
    assert caught.value.message.startswith("image 0: ")
    return caught.value


Run = Callable[[Coroutine[Any, Any, Any]], Any]


def test_an_image_and_what_its_host_gets_to_see(run: Run) -> None:
    async def main() -> None:
        async with Host(serve_image()).open() as host:
            await load(f"HTTP://127.0.0.1:{host.port}/a b/é?q=1#fragment")
            assert host.requests == [
                "GET /a%20b/%C3%A9?q=1 HTTP/1.1\r\n"
                f"Host: 127.0.0.1:{host.port}\r\n"
                "User-Agent: lmi-handler\r\n"
                "Accept: image/*, */*;q=0.5\r\n"
                "Accept-Encoding: identity\r\n"
                "Connection: close\r\n\r\n"
            ]

    run(main())


def test_proxies_of_the_environment_are_not_used(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1/")

    async def main() -> None:
        async with Host(serve_image()).open() as host:
            await load(host.url)

    run(main())


@pytest.mark.parametrize(
    "name",
    [
        "127.0.0.1",
        "localhost",
        "localhost.",
        "127.1",
        "0x7f000001",
        "2130706433",
        "017700000001",
        "0",
        "[::1]",
    ],
)
def test_this_machine_is_refused_however_it_is_spelled(run: Run, name: str) -> None:
    async def main() -> None:
        async with Host(serve_image()).open() as host:
            error = await refused(f"http://{name}:{host.port}/secret?token", allow_private=())
            assert type(error) is ImageError
            assert error.message == (
                "image 0: its host's address is not public; send the image as a data: URL, or have the "
                "operator allow the host with option.image_fetch_allow_private"
            )
            assert not host.requests

    run(main())


@pytest.mark.parametrize(
    ("allowed", "name"),
    [
        ("localhost", "LOCALHOST."),
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.0/8", "0x7f000001"),
        ("127.0.0.1", "[::ffff:127.0.0.1]"),
    ],
)
def test_the_operator_opens_a_host_an_address_or_a_network(run: Run, allowed: str, name: str) -> None:
    async def main() -> None:
        async with Host(serve_image()).open() as host:
            await load(f"http://{name}:{host.port}/", allow_private=(allowed,))

    run(main())


def test_a_name_is_resolved_once_and_that_answer_connected_to(run: Run) -> None:
    calls: list[str] = []

    def resolver(name: str, port: int) -> list[str]:
        calls.append(name)
        return ["127.0.0.1"] if len(calls) == 1 else ["169.254.169.254"]

    async def main() -> None:
        async with Host(serve_image()).open() as host:
            await load(f"http://rebinding.test:{host.port}/", resolver=resolver)
            assert f"Host: rebinding.test:{host.port}\r\n" in host.requests[0]
        assert calls == ["rebinding.test"]

    run(main())


def test_one_bad_address_among_good_ones_is_enough(run: Run) -> None:
    async def main() -> None:
        async with Host(serve_image()).open() as host:
            error = await refused(
                f"http://mixed.test:{host.port}/",
                resolver=lambda *_: ["127.0.0.1", "8.8.8.8", "169.254.169.254"],
            )
            assert "not public" in error.message
            assert "169.254" not in error.message
            assert not host.requests

    run(main())


def test_the_next_address_is_tried(run: Run) -> None:
    async def main() -> None:
        async with Host(serve_image()).open() as host:
            await load(f"http://two.test:{host.port}/", resolver=lambda *_: ["127.9.9.9", "127.0.0.1"])

    run(main())


@pytest.mark.skipif(sys.platform != "linux", reason="fills a listener's queue the Linux way")
def test_an_address_that_never_answers_leaves_time_for_the_next(run: Run) -> None:
    async def main() -> None:
        with contextlib.ExitStack() as sockets:
            mute = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
            address = mute.getsockname()
            for _ in range(3):
                waiting = sockets.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(address)
            server = await asyncio.start_server(Host(serve_image()).handle, "127.0.0.2", address[1])
            addresses = ["127.0.0.1", "127.0.0.2"]
            await load(f"http://two.test:{address[1]}/", resolver=lambda *_: addresses, fetch_timeout=2.0)
            server.close()
            error = await refused(f"http://127.0.0.1:{address[1]}/", fetch_timeout=0.2)
            assert type(error) is ImageFetchTimeout

    run(main())


@pytest.mark.parametrize("failure", [OSError("no such host"), UnicodeError("bad label"), None])
def test_a_name_that_does_not_resolve(run: Run, failure: Exception | None) -> None:
    def resolver(*_: Any) -> list[str]:
        if failure is not None:
            raise failure
        return []

    async def main() -> None:
        error = await refused("http://gone.test/", resolver=resolver)
        assert isinstance(error, ImageFetchFailed)
        assert error.message == "image 0: its host name cannot be resolved"

    run(main())


def test_only_allowed_domains(run: Run) -> None:
    def resolver(*_: Any) -> list[str]:
        return ["127.0.0.1"]

    async def main() -> None:
        async with Host(serve_image()).open() as host:
            domains = ("Images.Test.", "bücher.test")
            for name in ("images.test", "IMAGES.test.", "xn--bcher-kva.test"):
                await load(f"http://{name}:{host.port}/", allowed_domains=domains, resolver=resolver)
            for name in ("other.test", "a.images.test", "images.test.evil.test"):
                error = await refused(f"http://{name}:{host.port}/", allowed_domains=domains, resolver=resolver)
                assert "option.allowed_media_domains" in error.message
            assert "allowed_media_domains" in (await refused(host.url, allowed_domains=())).message
            elsewhere = Host(redirect("http://other.test/"))
            async with elsewhere.open():
                error = await refused(
                    f"http://images.test:{elsewhere.port}/", allowed_domains=domains, resolver=resolver
                )
                assert error.message.startswith("image 0: after a redirect, its host is not one of")

    run(main())


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(run: Run, status: int) -> None:
    async def main() -> None:
        async with (
            Host(serve_image()).open() as target,
            Host(redirect(f"{target.url}x y?q", status)).open() as host,
        ):
            await load(host.url)
            assert target.requests[0].startswith("GET /x%20y?q HTTP/1.1\r\n")

    run(main())


@pytest.mark.parametrize(
    ("location", "reason", "kind"),
    [
        ("http://169.254.169.254/latest/meta-data/", "its host's address is not public", ImageError),
        ("http://[::ffff:169.254.169.254]/", "its host's address is not public", ImageError),
        ("//10.0.0.1/", "its host's address is not public", ImageError),
        ("file:///etc/passwd", "file: URLs are refused", ImageFetchFailed),
        ("data:image/png;base64,AAAA", "data: URLs are refused", ImageFetchFailed),
        ("http://user:pw@127.0.0.1/", "user name or password", ImageFetchFailed),
        ("http://[/", "its URL is malformed", ImageFetchFailed),
        ("http://127.0.0.1:1/", "its host cannot be reached", ImageFetchFailed),
        ("\xff\xfe", "redirects more than 3 times", ImageFetchFailed),
    ],
)
def test_every_hop_is_checked(run: Run, location: str, reason: str, kind: type[ImageError]) -> None:
    async def main() -> None:
        async with Host(redirect(location)).open() as host:
            error = await refused(host.url)
            assert type(error) is kind
            assert reason in error.message
            assert "169.254" not in error.message

    run(main())


@pytest.mark.parametrize("most", [0, 3])
def test_an_endless_redirect(run: Run, most: int) -> None:
    async def main() -> None:
        async with Host(redirect("/again")).open() as host:
            error = await refused(host.url, max_redirects=most)
            assert type(error) is ImageFetchFailed
            assert f"redirects more than {most} times (option.image_fetch_max_redirects)" in error.message
            assert len(host.requests) == most + 1

    run(main())


def test_as_many_redirects_as_allowed(run: Run) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await (redirect("/") if len(host.requests) <= 2 else serve_image())(reader, writer)

    host = Host(serve)

    async def main() -> None:
        async with host.open():
            await load(host.url, max_redirects=2)

    run(main())


@pytest.mark.parametrize("status", [204, 206, 304, 401, 404, 429, 500, 503])
def test_other_answers(run: Run, status: int) -> None:
    async def main() -> None:
        async with Host(replying(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status)).open() as host:
            error = await refused(host.url + "?token=secret")
            assert type(error) is ImageFetchFailed
            assert error.message == f"image 0: its host answered with HTTP status {status}"

    run(main())


BIG = 50_000


@pytest.mark.parametrize(
    ("serve", "kind", "reason"),
    [
        (replying(OK + b"Content-Length: 99999999999999999999999\r\n\r\n"), None, ""),
        (replying(OK + b"Content-Length: 50001\r\n\r\n"), ImageTooLarge, "more than 50000 bytes"),
        (replying(OK + b"Content-Length: -1\r\n\r\n"), ImageFetchFailed, "proper HTTP"),
        (replying(OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n"), ImageFetchFailed, "proper HTTP"),
        (replying(OK + b"Content-Length: 5000\r\n\r\n" + IMAGE), ImageFetchFailed, "broke off"),
        (replying(OK + b"Content-Length: 20\r\n\r\n" + IMAGE), ImageError, "truncated or damaged"),
        (replying(OK + b"Content-Length: 0\r\n\r\n"), ImageError, "its file is empty"),
        (replying(OK + b"Content-Encoding: gzip\r\n\r\nnot gzip"), ImageFetchFailed, "Content-Encoding"),
        (replying(OK + b"Content-Encoding: br\r\n\r\n\x1b\x03"), ImageFetchFailed, "Content-Encoding br"),
        (
            replying(OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"\0" * 10_000_000)),
            ImageTooLarge,
            "more than 50000 bytes when decompressed",
        ),
        (replying(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), ImageFetchFailed, "proper HTTP"),
        (replying(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabc"), ImageFetchFailed, "broke off"),
        (
            replying(OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
            ImageFetchFailed,
            "proper HTTP",
        ),
        (replying(b"SSH-2.0-OpenSSH_9.2\r\n"), ImageFetchFailed, "proper HTTP"),
        (replying(b"HTTP/1.1 200\r\n\r\n<html>"), ImageError, "web page"),
        (replying(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n"), ImageFetchFailed, "proper HTTP"),
        (replying(), ImageFetchFailed, "broke off"),
        (flood(OK + b"\r\n", b"x" * 4096), ImageTooLarge, "more than 50000 bytes"),
        (
            flood(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b"x" * 4096 + b"\r\n"),
            ImageTooLarge,
            "",
        ),
        (
            flood(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
            ImageFetchFailed,
            "absurdly small",
        ),
        (
            flood(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1;" + b"e" * 9000 + b"\r\nx\r\n"),
            ImageTooLarge,
            "",
        ),
        (flood(OK, b"X-Bomb: " + b"b" * 1000 + b"\r\n"), ImageFetchFailed, "too large a reply header"),
        (flood(OK + b"X-Bomb: ", b"b" * 1000), ImageFetchFailed, "too large a reply header"),
        (flood(b"", b"HTTP/1.1 100 \r\n\r\n"), ImageFetchFailed, "too large a reply header"),
        (
            flood(b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n", b"x" * 1000),
            ImageFetchFailed,
            "more than 3 times",
        ),
    ],
)
def test_hostile_replies(run: Run, serve: Serve, kind: type[ImageError] | None, reason: str) -> None:
    async def main() -> None:
        async with Host(serve).open() as host:
            error = await refused(host.url, max_bytes=BIG)
            assert type(error) is kind or kind is None
            assert reason in error.message

    run(main())


@pytest.mark.parametrize("framing", ["length", "chunks", "close"])
def test_an_image_of_exactly_the_cap(run: Run, framing: str) -> None:
    reply = {
        "length": [OK + b"Content-Length: %d\r\n\r\n" % len(IMAGE), IMAGE],
        "chunks": [
            OK + b"Transfer-Encoding: chunked\r\n\r\n",
            *(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (IMAGE[:50], IMAGE[50:])),
            b"0\r\n\r\n",
        ],
        "close": [b"HTTP/1.0 200 OK\r\n\r\n", IMAGE],
    }[framing]

    async def main() -> None:
        async with Host(replying(*reply)).open() as host:
            await load(host.url, max_bytes=len(IMAGE))
            assert type(await refused(host.url, max_bytes=len(IMAGE) - 1)) is ImageTooLarge

    run(main())


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"Content-Encoding: gzip", gzip.compress(IMAGE)),
        (b"Content-Encoding: x-gzip", gzip.compress(IMAGE)),
        (b"Content-Encoding: deflate", zlib.compress(IMAGE)),
        (b"Content-Encoding: deflate, gzip", gzip.compress(zlib.compress(IMAGE))),
        (b"Content-Encoding: deflate\r\nContent-Encoding: gzip", gzip.compress(zlib.compress(IMAGE))),
        (b"Content-Encoding: identity", IMAGE),
        (b"Content-Encoding: aws-chunked", IMAGE),
    ],
)
def test_content_codings_are_undone(run: Run, header: bytes, body: bytes) -> None:
    """Object stores send the header that was stored with an object, whatever is asked for."""
    serve = replying(OK + header + b"\r\nContent-Length: %d\r\n\r\n" % len(body), body)

    async def main() -> None:
        async with Host(serve).open() as host:
            await load(host.url)

    run(main())


def test_a_reset_connection(run: Run) -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"Content-Length: 5000\r\n\r\nabc")
        await writer.drain()
        writer.transport.abort()

    async def main() -> None:
        async with Host(serve).open() as host:
            assert type(await refused(host.url)) is ImageFetchFailed

    run(main())


def test_nobody_listens(run: Run) -> None:
    async def main() -> None:
        async with Host(serve_image()).open() as host:
            url = host.url
        error = await refused(url)
        assert type(error) is ImageFetchFailed
        assert error.message == "image 0: its host cannot be reached"

    run(main())


def dripping(head: bytes) -> Serve:
    """A byte every 20 ms, for ever: no single wait is ever long."""

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    return serve


async def slow_redirects(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.1)
    writer.write(b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n")
    await writer.drain()


@pytest.mark.parametrize(
    "serve",
    [
        silence,
        dripping(OK + b"Content-Length: 1000\r\n\r\n"),
        dripping(OK + b"X-Slow: "),
        dripping(b""),
        slow_redirects,
    ],
    ids=["silence", "body", "header", "status", "redirects"],
)
def test_one_deadline_covers_everything(run: Run, serve: Serve) -> None:
    async def main() -> None:
        async with Host(serve).open() as host:
            async with asyncio.timeout(60):  # no host here would ever end
                error = await refused(host.url, fetch_timeout=0.4, max_redirects=1000)
            assert type(error) is ImageFetchTimeout
            assert error.message == "image 0: it did not arrive within 0.4 seconds (option.image_fetch_timeout)"

    run(main())


def test_the_deadline_covers_name_resolution(run: Run) -> None:
    answer = threading.Event()

    def resolver(*_: Any) -> list[str]:
        answer.wait(10)
        return ["127.0.0.1"]

    async def main() -> None:
        try:
            assert type(await refused("http://slow.test/", resolver=resolver, fetch_timeout=0.2)) is ImageFetchTimeout
        finally:
            answer.set()

    run(main())


def test_the_requests_own_deadline_is_kept(run: Run) -> None:
    async def main() -> None:
        async with Host(silence).open() as host:
            loader = opened()
            start = time.monotonic()
            with pytest.raises(ImageFetchTimeout, match="image 0: it was not ready when the request's time was up"):
                await loader.load([ImagePart(host.url)], deadline=start + 0.2)
            with pytest.raises(ImageFetchTimeout):
                await loader.load([ImagePart(host.url)], deadline=start)
            await loader.aclose()

    run(main())


@pytest.mark.parametrize(
    "reply",
    [b"", b"HTTP/1.1 2", OK + b"X-Slow: ", OK + b"Content-Length: 1000\r\n\r\nabc"],
    ids=["nothing", "status", "header", "body"],
)
def test_cancellation_closes_the_socket_at_once(run: Run, reply: bytes) -> None:
    async def main() -> None:
        waiting = asyncio.Event()
        gone = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(reply)
            await writer.drain()
            waiting.set()
            with contextlib.suppress(ConnectionError):
                await reader.read()
            gone.set()

        async with Host(serve).open() as host:
            loader = opened()
            loading = asyncio.create_task(loader.load([ImagePart(host.url)]))
            await waiting.wait()
            loading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await loading
            await asyncio.wait_for(gone.wait(), 30)
            await loader.aclose()

    run(main())


def test_cancellation_in_the_middle_of_a_tls_handshake(run: Run) -> None:
    async def main() -> None:
        greeted = asyncio.Event()
        gone = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            greeted.set()
            while await reader.read(4096):
                pass
            gone.set()
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        loader = opened()
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        loading = asyncio.create_task(loader.load([ImagePart(url)]))
        await greeted.wait()
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        await asyncio.wait_for(gone.wait(), 30)
        server.close()
        await loader.aclose()

    run(main())


def test_cancellation_while_a_name_is_resolved(run: Run) -> None:
    asked = threading.Event()
    answer = threading.Event()
    answered = threading.Event()

    def resolver(*_: Any) -> list[str]:
        asked.set()
        answer.wait(10)
        answered.set()
        return ["127.0.0.1"]

    async def main() -> None:
        loader = opened(resolver=resolver)
        loading = asyncio.create_task(loader.load([ImagePart("http://slow.test/")]))
        await asyncio.to_thread(asked.wait)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        assert not answered.is_set(), "it did not wait for the name"
        answer.set()
        await loader.aclose()

    run(main())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors the Linux way")
@pytest.mark.parametrize("turns", range(6))
def test_no_socket_is_left_whenever_the_cancellation_comes(run: Run, turns: int) -> None:
    """Cancelled after 0 to 50 passes of the event loop: before, while and after connecting."""

    async def main() -> None:
        async with Host(silence).open() as host:
            loader = opened()
            gc.collect()  # or files of earlier tests would be closed in between
            before = descriptors()
            for passes in range(10 * turns, 10 * turns + 10):
                loading = asyncio.create_task(loader.load([ImagePart(host.url), ImagePart(host.url)]))
                for _ in range(passes):
                    await asyncio.sleep(0)
                loading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await loading
            await host.idle()
            assert descriptors() <= before
            await loader.aclose()

    run(main())


def test_turns_are_shared_and_given_back(run: Run) -> None:
    """Waiting for a turn does not count as fetching; a cancelled fetch gives its turn back."""

    async def main() -> None:
        async with Host(silence).open() as stuck, Host(serve_image()).open() as host:
            loader = opened(max_concurrent_fetches=1, fetch_timeout=1.0)
            with pytest.raises(ImageFetchTimeout):
                await loader.load([ImagePart(stuck.url), *(ImagePart(host.url) for _ in range(3))])
            part = ImagePart(host.url)
            await loader.load([part])
            assert part.loaded is not None
            await loader.aclose()

    run(main())


@pytest.mark.parametrize(
    ("head", "piece", "kind"),
    [
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"40\r\n" + b"x" * 64 + b"\r\n", ImageTooLarge),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", ImageFetchFailed),
        (b"", b"HTTP/1.1 100 \r\n\r\n", ImageFetchFailed),
    ],
    ids=["small chunks", "tiny chunks", "interim replies"],
)
def test_the_event_loop_stays_free(run: Run, head: bytes, piece: bytes, kind: type[ImageError]) -> None:
    """Replies that take much parsing, all there at once, to many fetches: none may hold the loop for long."""
    reply = head + piece * (120_000 // len(piece))
    gc.collect()  # of all that other tests have left, which would be taken for work of the fetches

    async def main() -> None:
        async with Host(replying(reply)).open() as host:
            loader = opened(max_bytes=60_000, fetch_timeout=60)
            loads = [asyncio.create_task(loader.load([ImagePart(host.url)])) for _ in range(32)]
            longest = 0.0
            gc.disable()
            try:
                while not all(load.done() for load in loads):
                    start = time.thread_time()
                    await asyncio.sleep(0)
                    longest = max(longest, time.thread_time() - start)
            finally:
                gc.enable()
            assert {type(error) for error in await asyncio.gather(*loads, return_exceptions=True)} == {kind}
            assert longest < 0.2  # seconds of work in one pass of the loop
            await loader.aclose()

    run(main())


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context, its certificate for images.test and 127.0.0.1, and a client's that trusts it."""
    path = certificate(tmp_path_factory.mktemp("tls"), "images.test")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cafile=str(path))


def test_tls_verifies_the_name_not_the_address(run: Run, authority: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, client = authority

    async def main() -> None:
        async with Host(serve_image()).open(server) as host:
            given = {"resolver": lambda *_: ["127.0.0.1"], "ssl_context": client}
            await load(f"https://images.test:{host.port}/", **given)
            await load(f"https://127.0.0.1:{host.port}/", **given)
            error = await refused(f"https://other.test:{host.port}/", **given)
            assert type(error) is ImageFetchFailed
            assert error.message == "image 0: its host's TLS certificate cannot be verified"
            error = await refused(f"https://127.0.0.1:{host.port}/")
            assert error.message == "image 0: its host's TLS certificate cannot be verified"
            error = await refused(f"http://127.0.0.1:{host.port}/")
            assert type(error) is ImageFetchFailed
        async with Host(redirect("http://images.test/")).open(server) as host:
            error = await refused(f"https://images.test:{host.port}/", **given)
            assert error.message == "image 0: after a redirect, it would leave https for http, which is refused"

    run(main())


def test_a_host_that_speaks_no_tls(run: Run) -> None:
    async def handle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        error = await refused(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        assert type(error) is ImageFetchFailed
        assert error.message == "image 0: its host does not speak proper TLS"
        server.close()

    run(main())
