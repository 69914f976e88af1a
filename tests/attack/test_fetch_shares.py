"""No host, name server or request can hold up the fetching of others' images: with real sockets on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

import pytest

from handlers.images.fetch_slots import (
    MAX_REMEMBERED,
    RECOVERY_SECONDS,
    Claim,
    FetchSlots,
    claim_for,
    site_of,
)
from handlers.images.loader import ImageLoader
from handlers.request import ImagePart
from tests.support.image_host import OK, Host, opened, redirect, serve_image, silence

PLACES = 64
QUARTER = PLACES // 4
NEVER = 600.0
"""Seconds that no test waits."""


async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A byte now and then, for ever."""
    writer.write(OK + b"Content-Length: 1000\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.2)


@contextlib.asynccontextmanager
async def loading(**limits: object) -> AsyncIterator[ImageLoader]:
    loader = opened(max_concurrent_fetches=PLACES, fetch_timeout=NEVER, **limits)
    try:
        yield loader
    finally:
        await loader.aclose()


def named() -> contextlib.AbstractAsyncContextManager[ImageLoader]:
    """Every name leads to this machine."""
    return loading(resolver=lambda host, port: ["127.0.0.1"])


@contextlib.asynccontextmanager
async def spread(host: Host, addresses: dict[str, str]) -> AsyncIterator[ImageLoader]:
    """The host listens at the address of each of these names; every other name leads to this machine."""
    servers = [await asyncio.start_server(host.handle, address, host.port) for address in addresses.values()]
    try:
        async with loading(resolver=lambda name, port: [addresses.get(name, "127.0.0.1")]) as loader:
            yield loader
    finally:
        for server in servers:
            server.close()


@contextlib.asynccontextmanager
async def asking(loader: ImageLoader, urls: Iterable[str]) -> AsyncIterator[list[asyncio.Task[None]]]:
    """A request for each URL, under way."""
    tasks = [asyncio.create_task(loader.load([ImagePart(url)])) for url in urls]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 (of sockets and threads too)
            await asyncio.sleep(0.01)


async def fetched(loader: ImageLoader, url: str) -> None:
    async with asyncio.timeout(30):
        part = ImagePart(url)
        await loader.load([part])
    assert part.loaded is not None
    part.release()


@pytest.mark.parametrize("serve", [silence, drip])
def test_a_silent_host_holds_a_quarter_of_the_places(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> None:
    """192 requests to it; another client's image is fetched while all of them wait."""

    async def main() -> None:
        async with Host(serve).open() as stuck, Host(serve_image()).open() as good, named() as loader:
            transfers = loader._fetcher.transfers
            async with asking(loader, [stuck.url] * 192) as tasks:
                await until(lambda: len(stuck.requests) == QUARTER)
                await fetched(loader, f"http://good.test:{good.port}/")
                assert not any(task.done() for task in tasks)
                assert len(stuck.requests) == transfers.held == QUARTER
                assert transfers.waiting == 192 - QUARTER
            assert transfers.held == transfers.waiting == 0
            assert not transfers._queues
            assert not any(
                (
                    transfers._requests,
                    transfers._hosts,
                    transfers._addresses,
                    transfers._sites,
                    transfers._unproven,
                    transfers._unproven_at,
                )
            )

    asyncio.run(main())


def test_many_names_for_one_silent_address_share_its_places() -> None:
    async def main() -> None:
        async with Host(silence).open() as stuck, Host(serve_image()).open() as good, named() as loader:
            names = [f"http://silent{number}.test:{stuck.port}/" for number in range(100)]
            async with asking(loader, names) as tasks:
                await until(lambda: len(stuck.requests) == QUARTER)
                await until(lambda: loader._fetcher.transfers.waiting == 100 - QUARTER)
                await fetched(loader, f"http://good.test:{good.port}/")
                assert len(stuck.requests) == QUARTER
                assert not any(task.done() for task in tasks)

    asyncio.run(main())


def test_many_names_of_one_site_share_its_places_whatever_their_addresses() -> None:
    """A wildcard record with another address for each name."""
    addresses = {f"silent{number}.attacker.test": f"127.1.0.{number + 1}" for number in range(100)}

    async def main() -> None:
        async with (
            Host(silence).open() as stuck,
            Host(serve_image()).open() as good,
            spread(stuck, addresses) as loader,
        ):
            names = [f"http://{name}:{stuck.port}/" for name in addresses]
            async with asking(loader, names):
                await until(lambda: loader._fetcher.transfers.waiting == 100 - QUARTER)
                await fetched(loader, f"http://good.test:{good.port}/")
                await until(lambda: len(stuck.requests) == QUARTER)

    asyncio.run(main())


def test_hosts_that_never_delivered_leave_a_quarter_to_those_that_have() -> None:
    """Any number of sites and addresses."""
    addresses = {f"attacker{number}.test": f"127.2.0.{number + 1}" for number in range(200)}

    async def main() -> None:
        async with (
            Host(silence).open() as stuck,
            Host(serve_image()).open() as good,
            spread(stuck, addresses) as loader,
        ):
            await fetched(loader, f"http://good.test:{good.port}/")
            names = [f"http://{name}:{stuck.port}/" for name in addresses]
            async with asking(loader, names):
                await until(lambda: len(stuck.requests) == PLACES - QUARTER)
                for _ in range(3):
                    await fetched(loader, f"http://good.test:{good.port}/")
                assert len(stuck.requests) == PLACES - QUARTER

    asyncio.run(main())


def test_one_request_holds_a_quarter_of_the_places() -> None:
    async def main() -> None:
        async with Host(silence).open() as stuck, Host(silence).open() as other, loading() as loader:
            parts = [ImagePart(url) for url in [stuck.url, other.url] * 20]
            task = asyncio.create_task(loader.load(parts))
            await until(lambda: loader._fetcher.transfers.waiting == 40 - QUARTER)
            assert loader._fetcher.transfers.held == QUARTER
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert loader._fetcher.transfers.held == loader._fetcher.transfers.waiting == 0

    asyncio.run(main())


def test_a_redirect_takes_a_place_of_the_host_that_it_leads_to() -> None:
    async def main() -> None:
        async with (
            Host(silence).open() as stuck,
            Host(redirect(stuck.url)).open() as sender,
            loading() as loader,
            asking(loader, [sender.url] * 60),
        ):
            transfers = loader._fetcher.transfers
            await until(lambda: len(sender.requests) == 60)
            await until(lambda: transfers.waiting == 60 - QUARTER)
            assert transfers.held == transfers.held_by(("127.0.0.1", stuck.port)) == QUARTER
            assert transfers.held_by(("127.0.0.1", sender.port)) == 0

    asyncio.run(main())


def test_a_silent_name_server_holds_up_its_own_names_only() -> None:
    """Its threads cannot be stopped: they keep their places when the requests are gone."""
    asked: list[str] = []
    over = threading.Event()

    def resolver(host: str, port: int) -> list[str]:
        if host.endswith("silent.test"):
            asked.append(host)
            over.wait(60)
        return ["127.0.0.1"]

    async def main() -> None:
        async with Host(serve_image()).open() as good, loading(resolver=resolver) as loader:
            look_ups = loader._fetcher.look_ups
            share = look_ups.total // 4
            names = [f"http://name{number}.silent.test:{good.port}/" for number in range(100)]
            async with asking(loader, names):
                await until(lambda: len(asked) == share)
                await fetched(loader, f"http://good.test:{good.port}/")
                assert len(asked) == look_ups.held == share
            assert look_ups.held == share, "the threads are still there"
            assert look_ups.waiting == 0
            await fetched(loader, f"http://good.test:{good.port}/")
            over.set()
            await until(lambda: look_ups.held == 0)

    asyncio.run(main())


def test_each_time_out_halves_a_share_and_time_or_an_image_restores_it() -> None:
    now = [0.0]
    places = FetchSlots(PLACES, clock=lambda: now[0])
    claim = claim_for("request", "slow.test", 80, "192.0.2.1")
    shares = []
    for _ in range(6):
        places.timed_out(claim, connected=False)
        shares.append(places.share_of(claim.host))
    assert shares == [8, 4, 2, 1, 1, 1]
    assert places.share_of(claim.address) == 1
    now[0] += RECOVERY_SECONDS
    assert places.share_of(claim.host) == 2
    now[0] += 10 * RECOVERY_SECONDS
    assert places.share_of(claim.host) == QUARTER
    places.timed_out(claim, connected=True)
    assert places.share_of(claim.host) == QUARTER // 2
    assert places.share_of(claim.address) == QUARTER, "it has answered: another of its hosts may"
    for _ in range(3):
        places.delivered(claim)
    assert places.share_of(claim.host) == PLACES - QUARTER


def test_a_host_that_timed_out_has_fewer_requests_under_way() -> None:
    async def main() -> None:
        async with Host(silence).open() as stuck:
            loader = opened(max_concurrent_fetches=PLACES, fetch_timeout=0.2)
            async with asking(loader, [stuck.url] * 40) as tasks:
                await asyncio.gather(*tasks, return_exceptions=True)
            assert loader._fetcher.transfers.share_of(("127.0.0.1", stuck.port)) == 1
            assert loader._fetcher.transfers.held == 0
            await loader.aclose()

    asyncio.run(main())


def test_one_place_is_enough_for_everybody_in_turn() -> None:
    async def main() -> None:
        order: list[str] = []
        places = FetchSlots(1)

        async def visit(host: str, request: str) -> None:
            with await places.take(Claim(request, host, host)):
                order.append(host)
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(visit("flooded", f"flood {number}"))
            for number in range(3):
                group.create_task(visit("good", f"good {number}"))
        assert sorted(order) == ["flooded"] * 50 + ["good"] * 3
        assert [place for place, host in enumerate(order) if host == "good"] == [2, 4, 6], "host by host"

    asyncio.run(main())


@contextlib.asynccontextmanager
async def flooding(places: FetchSlots, claims: Iterable[Claim]) -> AsyncIterator[int]:
    """All of them ask, and none gives its place back. Yields how many of them hold one."""
    before = places.held
    tasks = [asyncio.create_task(places.take(claim)) for claim in claims]
    await asyncio.sleep(0)
    try:
        yield places.held - before
    finally:
        for task in tasks:
            task.cancel()
        for done in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(done, contextlib.ExitStack):
                done.close()
        assert places.held == before


async def has_a_place(places: FetchSlots, claim: Claim) -> bool:
    task = asyncio.create_task(places.take(claim))
    await asyncio.sleep(0)
    if task.done():
        task.result().close()
    else:
        task.cancel()
    return task.done() and not task.cancelled()


async def proven(places: FetchSlots, claim: Claim) -> None:
    for _ in range(3):
        with await places.take(claim):
            places.delivered(claim)


def flood(number: int, host: str, address: str = "192.0.2.1") -> list[Claim]:
    return [claim_for(f"{host} {each}", host, 443, address) for each in range(number)]


def test_hosts_that_never_delivered_do_not_keep_a_proven_one_from_their_common_address() -> None:
    async def main() -> None:
        places = FetchSlots(PLACES)
        good = claim_for("good", "cdn.good.test", 443, "192.0.2.1")
        await proven(places, good)
        floods = [claim for site in range(4) for claim in flood(PLACES, f"evil{site}.test")]
        async with flooding(places, floods) as held:
            assert held == QUARTER
            assert await has_a_place(places, good)

    asyncio.run(main())


def test_a_busy_proven_host_does_not_keep_a_new_one_from_their_common_address() -> None:
    async def main() -> None:
        places = FetchSlots(PLACES)
        await proven(places, claim_for("busy", "busy.test", 443, "192.0.2.1"))
        async with flooding(places, flood(PLACES, "busy.test")) as held:
            assert held == PLACES - QUARTER
            assert await has_a_place(places, claim_for("new", "new.test", 443, "192.0.2.1"))

    asyncio.run(main())


def test_hosts_below_a_shared_suffix_do_not_keep_each_other_out() -> None:
    async def main() -> None:
        places = FetchSlots(PLACES)
        floods = [claim for d in range(QUARTER) for claim in flood(2, f"d{d}evil.cloudfront.net", f"192.0.2.{d}")]
        async with flooding(places, floods):
            new = claim_for("good", "d1good.cloudfront.net", 443, "198.51.100.1")
            assert await has_a_place(places, new)

    asyncio.run(main())


def test_a_few_sites_do_not_keep_out_a_host_that_has_yet_to_deliver() -> None:
    """Three sites with a quarter each would hold all that hosts may hold that are not proven."""

    async def main() -> None:
        places = FetchSlots(PLACES)
        sites = 10
        floods = [claim for site in range(sites) for claim in flood(PLACES, f"evil{site}.test", f"192.0.2.{site}")]
        async with flooding(places, floods) as held:
            assert held == 2 * QUARTER + sites - 2
            assert await has_a_place(places, claim_for("good", "good.test", 443, "198.51.100.1"))

    asyncio.run(main())


def test_a_site_whose_hosts_have_delivered_leaves_a_quarter_to_others() -> None:
    async def main() -> None:
        places = FetchSlots(PLACES)
        names = [f"host{number}.evil.test" for number in range(4)]
        for number, name in enumerate(names):
            await proven(places, claim_for("first", name, 443, f"192.0.2.{number}"))
        floods = [claim for number, name in enumerate(names) for claim in flood(PLACES, name, f"192.0.2.{number}")]
        async with flooding(places, floods) as held:
            assert held == PLACES - QUARTER
            assert await has_a_place(places, claim_for("good", "good.test", 443, "198.51.100.1"))

    asyncio.run(main())


def test_one_host_that_delivers_holds_three_quarters_of_idle_places() -> None:
    async def main() -> None:
        places = FetchSlots(PLACES)
        await proven(places, claim_for("first", "bucket.s3.amazonaws.com", 443, "192.0.2.1"))
        claims = [claim_for(number, "bucket.s3.amazonaws.com", 443, f"192.0.2.{number}") for number in range(100)]
        async with flooding(places, claims) as held:
            assert held == PLACES - QUARTER

    asyncio.run(main())


def test_what_is_remembered_of_hosts_is_bounded() -> None:
    async def main() -> None:
        places = FetchSlots(PLACES)
        for number in range(3 * MAX_REMEMBERED):
            claim = claim_for(number, f"host{number}.test", 80, "2001:db8::1")
            with await places.take(claim):
                places.timed_out(claim, connected=True)
        assert len(places._records) == MAX_REMEMBERED
        assert not places._hosts
        assert not places._queues

    asyncio.run(main())


@pytest.mark.parametrize(
    ("host", "site"),
    [
        ("a.b.example.com", "example.com"),
        ("images.example.co.uk", "example.co.uk"),
        ("example.io", "example.io"),
        ("d1.cloudfront.net", "d1.cloudfront.net"),
        ("www.someone.github.io", "someone.github.io"),
        ("cloudfront.net", "cloudfront.net"),
        ("bucket.s3.us-west-2.amazonaws.com", "bucket.s3.us-west-2.amazonaws.com"),
        ("a.bucket.s3.us-west-2.amazonaws.com", "bucket.s3.us-west-2.amazonaws.com"),
        ("localhost", "localhost"),
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8::7", "2001:db8::7"),
    ],
)
def test_sites(host: str, site: str) -> None:
    assert site_of(host) == site


def test_addresses_of_one_ipv6_network_count_as_one() -> None:
    first, second = (claim_for(0, "a.test", 443, f"2001:db8::{number:x}") for number in (1, 0xFFFF))
    assert first.address == second.address
    assert first.address != claim_for(0, "a.test", 443, "2001:db8:0:1::1").address
