"""More requests than a server can answer, at a fixed rate whatever it does, from a process of their own.

    python -m tests.attack.overload HOST PORT RATE SECONDS

prints one JSON object: how many replies of which status, and how long refusals and `/ping` took. A body is asked for on
a connection of its own, as clients behind a load balancer do it; a ping too. Times are wall-clock: on a machine without
spare cores they are those of a machine that is shared with the load itself.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import uvloop

from tests.attack.target import KEY

PATIENCE = 30.0
PINGS = 10.0
"""Per second."""


@dataclass
class Seen:
    """statuses: replies by status, "none" where none came. seconds: by status, and "ping"."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def quantile(self, kind: str, part: float) -> float | None:
        times = sorted(self.seconds[kind])
        return round(times[min(len(times) - 1, int(len(times) * part))], 4) if times else None


async def once(host: str, port: int, request: bytes, seen: Seen, kind: str = "") -> None:
    """kind: under which the time is kept, instead of the reply's status."""
    began = time.perf_counter()
    status = "none"
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                status = head.split(b" ", 2)[1].decode()
            finally:
                writer.transport.abort()
    except (OSError, TimeoutError, asyncio.IncompleteReadError, IndexError):
        pass
    if kind:
        seen.statuses[f"{kind} {status}"] += 1
    else:
        seen.statuses[status] += 1
    seen.seconds[kind or status].append(time.perf_counter() - began)


async def load(host: str, port: int, body: bytes, rate: float, seconds: float) -> Seen:
    seen = Seen()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    request = head.encode() + body
    ping = b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

    async def at(rate: float, request: bytes, kind: str) -> None:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as running:
            for number in range(int(rate * seconds)):
                await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
                running.create_task(once(host, port, request, seen, kind))

    await asyncio.gather(at(rate, request, ""), at(PINGS, ping, "ping"))
    return seen


def main() -> None:
    """The body comes on standard input."""
    host, port, rate, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        seen = runner.run(load(host, port, sys.stdin.buffer.read(), rate, seconds))
    kinds = ("200", "429", "ping")
    quantiles = {kind: [seen.quantile(kind, 0.5), seen.quantile(kind, 0.99)] for kind in kinds}
    print(json.dumps({"statuses": seen.statuses, "p50_p99": quantiles}))


if __name__ == "__main__":
    main()
