"""Shares a limited number of slots for network access, so that no host can block the others.

A host that does not answer holds each of its slots until its time is up. Therefore a host may hold only some of the
slots, and fewer after each time-out; and requests wait behind those for the same host, not for another.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TypeAlias

MAX_REMEMBERED = 4096
"""Number of most recently used hosts and addresses whose record is kept."""

RECOVERY_SECONDS = 30.0
"""After this long without a time-out, a host's reduced share doubles; and again after the same time."""

MAX_PASSED_OVER = 512
"""Number of waiting requests that are considered when a slot becomes free. The others come first the next time."""

_ONE_LABEL = (
    "akamaihd.net akamaized.net azureedge.net azurewebsites.net b-cdn.net blogspot.com cloudfront.net firebaseapp.com "
    "fly.dev github.io gitlab.io herokuapp.com netlify.app onrender.com pages.dev r2.dev supabase.co vercel.app "
    "web.app workers.dev"
)
SHARED_SUFFIXES = dict.fromkeys(_ONE_LABEL.split(), 1) | {
    "aliyuncs.com": 2,  # bucket.oss-region
    "amazonaws.com": 3,  # bucket.s3.region
    "appspot.com": 3,  # name.region.r
    "azurefd.net": 2,
    "backblazeb2.com": 3,  # bucket.s3.region
    "cdn77.org": 2,
    "cloudflarestorage.com": 2,  # account.r2
    "digitaloceanspaces.com": 3,  # bucket.region.cdn
    "fastly.net": 3,  # name.global.ssl
    "googleapis.com": 2,  # bucket.storage
    "myqcloud.com": 3,  # bucket.cos.region
    "run.app": 2,
    "windows.net": 3,  # account.blob.core
}
"""Suffixes below which anyone may have a name -> the number of labels before them that distinguish the owners.

These are well-known ones from the private part of https://publicsuffix.org/list/. Hosts below any other suffix count as
one site.
"""


@dataclass(slots=True)
class HostRecord:
    """How a host or an address has behaved.

    Attributes:
        share: Number of slots that it may hold.
        changed: Time of the last change of the share.
        proven: Whether it has delivered an image since its last time-out.
    """

    share: int
    changed: float
    proven: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """What a slot is for.

    Attributes:
        request: The request that the image belongs to.
        host: The host, with its port.
        site: The part of the name that hosts of one owner probably share.
        address: The address that the host was resolved to, with the port; None while it is unknown.
    """

    request: Hashable
    host: Hashable
    site: Hashable
    address: Hashable | None = None


class FetchSlots:
    """Lets at most `total` claims hold a slot at a time. Used on one event loop.

    A request may hold a quarter of the `total`. A host or an address may hold a quarter at first, up to three quarters
    after successes, and half as many as before (at least one) after each time-out. All hosts of one site may hold three
    quarters.

    Hosts that are not proven may hold a quarter at one address, a quarter at one site, and three quarters together, so
    that hosts that deliver always find a slot. The last of these three quarters goes only to sites that hold none of
    them, so that a few sites cannot exclude a host that has yet to deliver its first image.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Create free slots; `clock` returns seconds."""
        self.total = total
        self.held = 0
        self._clock = clock
        self._quarter = max(1, total // 4)
        self._most = max(1, total - total // 4)
        self._most_open = max(1, self._most - total // 4)
        self._records: OrderedDict[Hashable, HostRecord] = OrderedDict()
        self._requests: Counter[Hashable] = Counter()
        self._hosts: Counter[Hashable] = Counter()
        self._addresses: Counter[Hashable] = Counter()
        self._sites: Counter[Hashable] = Counter()
        self._unproven: Counter[Hashable] = Counter()
        """Slots of hosts that are not proven, by site."""
        self._unproven_at: Counter[Hashable] = Counter()
        """The same, by address."""
        self._queues: OrderedDict[Hashable, _Queue] = OrderedDict()

    @property
    def waiting(self) -> int:
        return sum(len(claims) for queue in self._queues.values() for claims in queue.values())

    def held_by(self, host: Hashable) -> int:
        return self._hosts[host]

    def share_of(self, host_or_address: Hashable) -> int:
        """Return how many slots a host or an address may hold now."""
        return self._current(host_or_address).share

    async def take(self, claim: Claim) -> ExitStack:
        """Wait for a slot, which is held until it is closed. If cancelled, it leaves nothing behind."""
        if claim.host not in self._queues and self._may(claim):
            return self._granted(claim)
        waiting = _Waiting(claim)
        queue = self._queues.setdefault(claim.host, OrderedDict())
        queue.setdefault(claim.request, deque()).append(waiting)
        if self._may(claim):
            self._serve()
        try:
            return await waiting.turn
        except asyncio.CancelledError:
            if waiting.turn.done() and not waiting.turn.cancelled():
                waiting.turn.result().close()
            else:
                self._leave(waiting)
            raise

    def delivered(self, claim: Claim) -> None:
        """Record a success: the host and the address may hold more slots."""
        for key in (claim.host, claim.address):
            if key is not None:
                record = self._current(key)
                record.share = min(self._most, max(record.share * 2, self._quarter))
                record.proven = True

    def timed_out(self, claim: Claim, *, connected: bool) -> None:
        """Record a time-out: the host and the address may hold fewer slots.

        Args:
            claim: What the slot was for.
            connected: Whether the address accepted the connection. Then other hosts' requests to the address
                may still be answered, and only the host's share is reduced.
        """
        for key in (claim.host,) if connected else (claim.host, claim.address):
            if key is not None:
                record = self._current(key)
                record.share = max(1, record.share // 2)
                record.changed, record.proven = self._clock(), False

    def _may(self, claim: Claim) -> bool:
        if self.held >= self.total or self._requests[claim.request] >= self._quarter:
            return False
        host = self._current(claim.host)
        if self._hosts[claim.host] >= host.share or self._sites[claim.site] >= self._most:
            return False
        if not host.proven:
            return self._may_unproven(claim)
        if claim.address is None:
            return True
        # A proven host is not responsible for the other hosts at its address.
        address = self._current(claim.address)
        return self._addresses[claim.address] < (self._most if address.proven else address.share)

    def _may_unproven(self, claim: Claim) -> bool:
        if claim.address is not None:
            # Slots of proven hosts at the address do not count, so that a busy host does not exclude a new one.
            share = min(self._current(claim.address).share, self._quarter)
            if self._unproven_at[claim.address] >= share:
                return False
        together, of_site = self._unproven.total(), self._unproven[claim.site]
        if of_site == 0:
            return together < self._most
        return of_site < self._quarter and together < self._most_open

    def _granted(self, claim: Claim) -> ExitStack:
        unproven = not self._current(claim.host).proven
        self.held += 1
        self._count(claim, unproven, 1)
        slot = ExitStack()
        slot.callback(self._release, claim, unproven)
        return slot

    def _count(self, claim: Claim, unproven: bool, change: int) -> None:
        for counter, key, counts in (
            (self._requests, claim.request, True),
            (self._hosts, claim.host, True),
            (self._addresses, claim.address, claim.address is not None),
            (self._sites, claim.site, True),
            (self._unproven, claim.site, unproven),
            (self._unproven_at, claim.address, unproven and claim.address is not None),
        ):
            if counts:
                counter[key] += change
                if not counter[key]:
                    del counter[key]

    def _release(self, claim: Claim, unproven: bool) -> None:
        self.held -= 1
        self._count(claim, unproven, -1)
        self._serve()

    def _serve(self) -> None:
        """Give free slots to waiting requests: the hosts in turn, and each host's requests in turn."""
        looks, granted = MAX_PASSED_OVER, True
        while granted:
            granted = False
            for _ in range(len(self._queues)):
                if looks <= 0 or self.held >= self.total or not self._queues:
                    return
                host, queue = next(iter(self._queues.items()))
                self._queues.move_to_end(host)
                looks -= 1
                for _ in range(len(queue)):
                    if looks <= 0 or self._hosts[host] >= self._current(host).share:
                        break
                    looks -= 1
                    request, claims = next(iter(queue.items()))
                    queue.move_to_end(request)
                    waiting = claims[0]
                    if waiting.turn.done():  # cancelled just now
                        self._leave(waiting)
                    elif self._may(waiting.claim):
                        self._leave(waiting)
                        waiting.turn.set_result(self._granted(waiting.claim))
                        granted = True
                        break

    def _leave(self, waiting: _Waiting) -> None:
        """Remove from the queue; safe to call twice."""
        host, request = waiting.claim.host, waiting.claim.request
        queue = self._queues.get(host, OrderedDict())
        claims = queue.get(request, deque())
        with suppress(ValueError):
            claims.remove(waiting)
        if not claims:
            queue.pop(request, None)
        if not queue:
            self._queues.pop(host, None)

    def _current(self, key: Hashable) -> HostRecord:
        """Return the record, recovered for the time that has passed."""
        now = self._clock()
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = HostRecord(self._quarter, now)
            while len(self._records) > MAX_REMEMBERED:
                self._records.popitem(last=False)
            return record
        self._records.move_to_end(key)
        while record.share < self._quarter and now - record.changed >= RECOVERY_SECONDS:
            record.share = min(self._quarter, record.share * 2)
            record.changed += RECOVERY_SECONDS
        return record


def claim_for(request: Hashable, host: str, port: int, address: str | None = None) -> Claim:
    """Make a claim for a transfer, or for a look-up of the host's name if `address` is None."""
    site = site_of(host)
    if address is None:
        return Claim(request, site, site)
    number = ipaddress.ip_address(address)
    network = int(number) if number.version == 4 else ("/64", int(number) >> 64)
    return Claim(request, (host, port), site, (network, port))


def site_of(host: str) -> str:
    """Return the part of a host name that one owner has probably registered; an address is its own site.

    For example "images.example.co.uk" -> "example.co.uk", "a.github.io" -> "a.github.io".
    """
    labels = host.split(".")
    if ":" in host or labels[-1].isdigit():
        return host
    own = SHARED_SUFFIXES.get(".".join(labels[-2:]))
    if own is not None:
        return ".".join(labels[-2 - own :])
    second_level = len(labels) > 2 and len(labels[-1]) == 2 and len(labels[-2]) <= 3
    return ".".join(labels[-3 if second_level else -2 :])


@dataclass(slots=True, eq=False)
class _Waiting:
    claim: Claim
    turn: asyncio.Future[ExitStack] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


_Queue: TypeAlias = "OrderedDict[Hashable, deque[_Waiting]]"
"""Queue of one host: request -> its waiting claims."""
