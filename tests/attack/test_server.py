"""A hostile client against the whole server. Two bounds hold for every attack: no process grows by more than 3 times
the bytes that were sent and 50 MB, and the event loop never stalls above 50 ms. After each, nothing is left over and a
normal question about an image is answered rightly.

Nothing here is judged by the clock: memory is what the kernel counted, time is processor time (see `probe`), and an
attack that only used too much time is tried again, since a busy machine makes even that a little larger.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.attack import corpus, costly, raw
from tests.attack.hosts import Host, private_urls, redirect, reply
from tests.attack.payloads import payloads
from tests.attack.sending import asks, bounded, head_of, post, refused_or_answered
from tests.attack.target import EVIL, GOOD, MB, SLACK, Bound, Measured, Target, encoded

MUTATIONS = 2000
SEED = 20_260_401
_PNG = encoded(Image.effect_noise((16, 16), 60), "PNG")


@pytest.mark.timeout(900)
def test_hostile_images_are_bounded(target: Target) -> None:
    """Each alone, and small ones as two that differ in one request; those that are cut off, of which there are
    several of each, together."""
    broken, cut = {}, []
    for name, image in corpus.hostile():
        if "cut" in name:
            cut += [asks(image)] if len(image) < 100_000 else []
            continue
        bodies = [asks(image)] if len(image) > 500_000 else [asks(image, image + b"\0")]

        def attack(measured: Measured, bodies: list[bytes] = bodies) -> None:
            measured.sent = sum(map(len, bodies))
            refused_or_answered(asyncio.run(post(target, bodies)))

        try:
            bounded(target, attack, cpu=5.0, ask=False)
        except (Bound, AssertionError) as error:
            broken[name] = str(error)
    assert not broken

    def attack_with_cut_ones(measured: Measured) -> None:
        measured.sent = sum(map(len, cut))
        refused_or_answered(asyncio.run(post(target, cut)))

    bounded(target, attack_with_cut_ones)


@pytest.mark.parametrize(("kind", "count"), [("segments", 400_000), ("segments", 100_000), ("strips", 200_000)])
def test_work_for_clients_that_left_ends(target: Target, kind: str, count: int) -> None:
    """As soon as a question asked afterwards is answered, the server has nothing left to do."""
    image: bytes = getattr(costly, kind)(count)
    bodies = [asks(image + bytes([number])) for number in range(6)]

    async def leave(body: bytes) -> None:
        _, writer = await asyncio.open_connection(*target.address)
        with contextlib.suppress(OSError):  # refused while it is sent
            writer.write(head_of(len(body)) + body)
            await writer.drain()
        await asyncio.sleep(0.3)  # what a client has of patience
        writer.transport.abort()

    async def all_leave() -> None:
        await asyncio.gather(*map(leave, bodies))

    def attack(measured: Measured) -> None:
        measured.sent = sum(map(len, bodies))
        asyncio.run(all_leave())
        target.settle()

    bounded(target, attack, cpu=8.0)


@pytest.mark.parametrize("payload", list(payloads()), ids=lambda payload: payload.name)
def test_a_costly_body_is_bounded(target: Target, payload: Any) -> None:
    def attack(measured: Measured) -> None:
        measured.sent = len(payload.body)
        replies = asyncio.run(
            post(target, [payload.body], payload.path, headers={"content-type": payload.content_type})
        )
        refused_or_answered(replies)

    bounded(target, attack)


@pytest.mark.parametrize("start", range(0, MUTATIONS, 500))
def test_mutated_images_are_answered_or_refused(target: Target, start: int) -> None:
    """One in a request, 16 requests at a time; one that is refused would refuse its neighbours, too."""
    images = itertools.islice(corpus.mutations(SEED, MUTATIONS), start, start + 500)
    bodies = [asks(image) for _, image in images]

    def attack(measured: Measured) -> None:
        measured.sent = sum(map(len, bodies))
        refused_or_answered(asyncio.run(post(target, bodies, at_once=16)))

    bounded(target, attack)


def test_good_images_of_the_corpus_are_answered(target: Target) -> None:
    """But those of more pixels than this server takes."""
    named = list(corpus.good())
    replies = asyncio.run(post(target, [asks(image) for _, image in named]))
    for (name, _), answer in zip(named, replies, strict=True):
        assert isinstance(answer, httpx.Response), name
        too_large = answer.status_code == 413 and "max_image_pixels" in answer.text
        assert answer.status_code == 200 or too_large, (name, answer.text[:300])


def test_what_is_hardly_http_is_refused(target: Target) -> None:
    """All at once; where that breaks a bound, each alone, to tell which."""
    tricks = list(raw.tricks())

    async def send_all() -> list[list[int]]:
        return await asyncio.gather(*(raw.send(target.address, trick, patience=2.0) for trick in tricks))

    with target.attack() as measured:
        measured.sent = sum(len(trick.data) for trick in tricks)
        replies = asyncio.run(send_all())
    target.settle()
    for trick, statuses in zip(tricks, replies, strict=True):
        assert len(statuses) <= trick.most, (trick.name, statuses)
        assert all(status < 500 for status in statuses), (trick.name, statuses)
    try:
        measured.within()
    except Bound:
        broken = {}
        for trick in tricks:
            try:
                bounded(
                    target,
                    lambda _, trick=trick: asyncio.run(raw.send(target.address, trick, patience=0.1)),
                    ask=False,
                )
            except Bound as error:
                broken[trick.name] = str(error)
        assert not broken


def test_no_private_address_is_fetched_from(target: Target) -> None:
    """In every spelling, and behind a redirect of a host that may be asked."""
    image = reply(_PNG)
    with Host("127.0.0.1", image) as private, Host("::1", image, private.port) as private6:
        urls = private_urls(private.port)
        bodies = [asks(url) for url in urls]
        markdown = [json.dumps({"inputs": f"![]({url}) What?"}).encode() for url in urls]
        with Host(GOOD, redirect(f"http://127.0.0.1:{private.port}/")) as good:
            bodies.append(asks(good.url))
            replies = asyncio.run(post(target, bodies, at_once=16))
            replies += asyncio.run(post(target, markdown, "/invocations", at_once=16))
            assert len(good.connections) == 1
        refused_or_answered(replies)
        for url, answer in zip(urls, replies, strict=False):
            assert isinstance(answer, httpx.Response)
            if url.strip():
                assert answer.status_code != 200, url
            assert "127.0.0.1" not in answer.text, answer.text
        assert (private.connections, private6.connections) == ([], [])


def test_a_silent_host_does_not_keep_other_hosts_images_waiting(target: Target) -> None:
    """An image of another host is answered while all who ask the silent one still wait."""
    image = reply(_PNG)

    async def ask(silent: Host, good: Host) -> None:
        waiting = asyncio.create_task(
            post(
                target,
                [asks(f"{silent.url}?{n}") for n in range(48)],
                at_once=48,
            )
        )
        while not silent.connections:  # noqa: ASYNC110 - its host runs in a thread
            await asyncio.sleep(0.01)
        [answer] = await post(target, [asks(good.url)])
        assert isinstance(answer, httpx.Response)
        assert answer.status_code == 200, answer.text
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    with Host(EVIL, None) as silent, Host(GOOD, image) as good:
        asyncio.run(asyncio.wait_for(ask(silent, good), 60))
    target.settle()


def test_unfinished_bodies_are_bounded_together(target: Target) -> None:
    """24 clients that send all of 28 MB but a byte: a few are let in, the others are told to come again."""
    size, clients = 28 * MB, 24
    head = head_of(size)
    data = bytes(MB)

    async def send() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*target.address)
        try:
            writer.write(head)
            for _ in range(size // MB - 1):
                writer.write(data)
                await asyncio.wait_for(writer.drain(), 20)
        except (OSError, TimeoutError):
            pass
        return reader, writer

    async def all_send() -> list[bytes]:
        connections = await asyncio.gather(*(send() for _ in range(clients)))
        reply = await asyncio.to_thread(target.http.get, "/ping")
        assert reply.status_code == 200
        heads = []
        for reader, writer in connections:
            try:
                heads.append(await asyncio.wait_for(reader.read(12), 0.1))
            except (TimeoutError, OSError):
                heads.append(b"")
            writer.transport.abort()
        return heads

    def attack(measured: Measured) -> None:
        heads = asyncio.run(all_send())
        assert {head[9:12] for head in heads} <= {b"", b"429", b"503", b"413"}, heads

    bounded(target, attack, allowed=192 * MB + SLACK)


def test_more_clients_than_there_are_places_are_refused_and_none_is_lost(target: Target) -> None:
    """64 places, 400 clients at once: each gets an answer or a 429, and the platform's /ping is answered meanwhile."""
    bodies = [asks(_PNG + bytes([number % 251])) for number in range(400)]

    async def flood() -> list[Any]:
        sending = asyncio.create_task(post(target, bodies, at_once=400))
        async with httpx.AsyncClient(base_url=target.url, timeout=60) as client:
            while not sending.done():
                assert (await client.get("/ping")).status_code == 200
                await asyncio.sleep(0.02)
        return await sending

    def attack(measured: Measured) -> None:
        measured.sent = sum(map(len, bodies))
        replies = asyncio.run(flood())
        statuses = [answer.status_code if isinstance(answer, httpx.Response) else 0 for answer in replies]
        assert set(statuses) <= {200, 429}, {status: statuses.count(status) for status in set(statuses)}
        assert statuses.count(200) >= 64

    bounded(target, attack)


def test_clients_that_leave_lose_nothing(target: Target) -> None:
    """200, at every point of their requests: in the head, in the body, while it is decoded, in the answer."""
    whole = asks(_PNG, tokens=200)
    request = head_of(len(whole)) + whole

    async def leave(number: int) -> None:
        _, writer = await asyncio.open_connection(*target.address)
        most = len(request) if number % 2 else len(request) * number // 200
        writer.write(request[:most])
        await writer.drain()
        await asyncio.sleep(number % 20 / 200)  # what differs is how far the server has got
        writer.transport.abort()

    async def all_leave() -> None:
        for start in range(0, 200, 40):
            await asyncio.gather(*map(leave, range(start, start + 40)))

    def attack(measured: Measured) -> None:
        measured.sent = 200 * len(request)
        asyncio.run(all_leave())

    bounded(target, attack)


def test_the_log_is_valid_and_short_whatever_was_sent(target: Target) -> None:
    """Native libraries' messages included: the attacks above wrote less than 400 bytes a request."""
    fax = [asks(costly.fax(200_000)), asks(costly.fax(1000))]

    def logged() -> int:
        """How much, up to the line of a request that is made now."""
        target.wait_for(target.chat("hello", max_tokens=1).headers["x-request-id"])
        return len(target.log)

    before = logged()
    asyncio.run(post(target, fax))
    target.question()
    assert logged() - before < 2000 * (len(fax) + 2)
    target.logged()


def test_sockets_and_threads_are_given_back(target: Target) -> None:
    """After 300 connections that ask for nothing, and all that came before."""

    def held() -> int:
        front = target.tree()[0]
        return front.num_fds()

    before = held()
    connections = [socket.create_connection(target.address) for _ in range(300)]
    target.question()
    for connection in connections:
        connection.close()
    target.settle()
    for _ in range(200):
        if held() <= before + 8:
            break
        target.probe.read()  # two ticks of its loop
    assert held() <= before + 8
