"""Behaviour under far more requests than can be answered: refusals, probes, and the requests that are answered.

    python -m bench.overload
    python -m bench.overload --body 1300000 --times 1.5,10

A server with the model in examples/shapes first gets requests as fast as it answers, which gives its
capacity. Then requests arrive at random at multiples of that rate, each on its own connection, from other
processes, while another process requests `/ping` twenty times a second. The results are latencies (of whole
replies, from the time when each request was due), statuses, connections that were reset, and the processor
time of the server's front end. The last shows the cost of a refusal; the others also depend on how busy the
machine is, since the generators need processors of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import multiprocessing
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.pool import Pool
from pathlib import Path

import msgspec
import uvloop

from bench import report
from bench.run import results_folder
from bench.servers import HOST, free_port, interrupt_on_termination, our_command, started

SHAPES = Path(__file__).parent.parent / "examples" / "shapes"
PATIENCE = 60.0
PINGS_PER_SECOND = 20.0


@dataclass
class Seen:
    """Replies to requests.

    Attributes:
        times: Status -> seconds from when each request was due to the end of its reply; 0 if no reply came.
        late: Seconds by which the generator itself sent each request too late, a sign of a machine that is
            too busy to measure.
    """

    times: dict[int, list[float]] = field(default_factory=dict)
    late: list[float] = field(default_factory=list)

    def add(self, status: int, seconds: float) -> None:
        self.times.setdefault(status, []).append(seconds)

    def merge(self, other: Seen) -> None:
        for status, times in other.times.items():
            self.times.setdefault(status, []).extend(times)
        self.late += other.late

    def quantiles(self, status: int) -> str:
        """Return the median and the 99th percentile in milliseconds."""
        return _quantiles(self.times.get(status, []))

    def counts(self) -> str:
        return ", ".join(f"{status or 'reset'}: {len(times)}" for status, times in sorted(self.times.items()))


def _quantiles(seconds: list[float]) -> str:
    found = sorted(seconds)
    if not found:
        return "-"
    return "/".join(f"{found[min(len(found) - 1, int(part * len(found)))] * 1000:.0f}" for part in (0.5, 0.99))


class _Exchange(asyncio.Protocol):
    """One request on its own connection, which the server closes after the reply."""

    def __init__(self, request: bytes, done: asyncio.Future[int]) -> None:
        self._request = request
        self._done = done
        self._status = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert hasattr(transport, "write")
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._status:
            self._status = int(data[9:12])

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_result(self._status)


async def _exchange(port: int, request: bytes) -> int:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[int] = loop.create_future()
    try:
        async with asyncio.timeout(PATIENCE):
            transport, _ = await loop.create_connection(lambda: _Exchange(request, done), HOST, port)
            try:
                return await done
            finally:
                transport.close()
    except (OSError, TimeoutError):
        return 0


def arrivals(port: int, request: bytes, rate: float, seconds: float, seed: int) -> Seen:
    """Send requests at random times, whatever the server does."""

    async def run() -> Seen:
        seen, chance = Seen(), random.Random(seed)

        async def one(due: float) -> None:
            seen.late.append(time.perf_counter() - due)
            seen.add(await _exchange(port, request), time.perf_counter() - due)

        due = time.perf_counter()
        end, tasks = due + seconds, []
        while due < end:
            due += chance.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(one(due)))
        await asyncio.gather(*tasks)
        return seen

    return uvloop.run(run())


def streams(port: int, request: bytes, count: int, seconds: float) -> Seen:
    """Run `count` clients, each of which sends its next request as soon as it has its reply."""

    async def run() -> Seen:
        seen, end = Seen(), time.perf_counter() + seconds

        async def one() -> None:
            while (begin := time.perf_counter()) < end:
                seen.add(await _exchange(port, request), time.perf_counter() - begin)

        await asyncio.gather(*(one() for _ in range(count)))
        return seen

    return uvloop.run(run())


def front_seconds(port: int) -> float:
    """Return the processor time of the server's front end so far."""
    connection = http.client.HTTPConnection(HOST, port, timeout=PATIENCE)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    found = re.search(r"^process_cpu_seconds_total (\S+)$", page, re.MULTILINE)
    assert found is not None, page
    return float(found[1])


def _request(body: int, tokens: int) -> bytes:
    """Build a request whose JSON body is padded with white space to `body` bytes."""
    question = {
        "messages": [{"role": "user", "content": "What do you see?"}],
        "max_tokens": tokens,
        "ignore_eos": True,
    }
    content = msgspec.json.encode(question).ljust(body)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\nconnection: close\r\n\r\n".encode() + content


PING = f"GET /ping HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n\r\n".encode()


def _measured(port: int, work: Callable[[], Seen]) -> tuple[Seen, float]:
    """Return what was seen, and the processor time of the front end meanwhile."""
    before = front_seconds(port)
    seen = work()
    return seen, front_seconds(port) - before


def _overload(
    pool: Pool, port: int, request: bytes, rate: float, arguments: argparse.Namespace
) -> tuple[Seen, Seen, float]:
    """Return the replies, those to the pings beside them, and the front end's seconds."""
    generators = arguments.generators
    before = front_seconds(port)
    pings = pool.apply_async(arrivals, (port, PING, PINGS_PER_SECOND, arguments.seconds, 0))
    each = [(port, request, rate / generators, arguments.seconds, seed + 1) for seed in range(generators)]
    seen = Seen()
    for part in pool.starmap(arrivals, each):
        seen.merge(part)
    return seen, pings.get(), front_seconds(port) - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m bench.overload",
    )
    parser.add_argument("--times", default="1.5,10", metavar="N,..", help="of the capacity (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each (%(default)s)")
    parser.add_argument("--body", type=int, default=0, help="bytes of a request's body, or as it is")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer (%(default)s)")
    parser.add_argument("--places", type=int, default=32, help="answers under way at most (%(default)s)")
    parser.add_argument("--generators", type=int, default=2, help="processes that send (%(default)s)")
    arguments = parser.parse_args()
    interrupt_on_termination()
    out, port = results_folder("overload"), free_port()
    half = max(1, arguments.places // 2)
    options = [f"max_rolling_batch_size={half}", f"job_queue_size={arguments.places - half}"]
    request = _request(arguments.body, arguments.tokens)
    print(f"machine: {report.machine()}")
    print(f"{arguments.places} places, bodies of {len(request)} bytes, {arguments.generators} generators")
    command = our_command(SHAPES, port, options)
    pool = multiprocessing.get_context("spawn").Pool(arguments.generators + 1)
    with started("ours", command, port, out / "server.log"), pool:
        pool.apply(streams, (port, request, 4, 2.0))
        pinged, cpu = _measured(port, lambda: pool.apply(streams, (port, PING, 4, 2.0)))
        count = sum(map(len, pinged.times.values()))
        print(f"a ping alone: {cpu / count * 1000:.2f} ms of the front, connection included")
        seen, cpu = _measured(port, lambda: pool.apply(streams, (port, request, half, arguments.seconds)))
        answered = len(seen.times.get(200, []))
        capacity, each = answered / arguments.seconds, cpu / max(1, answered)
        print(f"capacity: {capacity:.1f} requests/s with {half} clients; {each * 1000:.2f} ms of the front each")
        for times in map(float, arguments.times.split(",")):
            seen, pings, cpu = _overload(pool, port, request, times * capacity, arguments)
            answered, refused = len(seen.times.get(200, [])), len(seen.times.get(429, []))
            own = (cpu - answered * each) / refused * 1000 if refused else 0.0
            print(
                f"{times:g} times: {seen.counts()}\n"
                f"  p50/p99 in ms: 200 {seen.quantiles(200)}, 429 {seen.quantiles(429)}, "
                f"ping {pings.quantiles(200)} ({pings.counts()}); sent late by {_quantiles(seen.late)}; "
                f"front busy {cpu / arguments.seconds:.0%}; {own:.2f} ms of it for a refusal"
            )


if __name__ == "__main__":
    main()
