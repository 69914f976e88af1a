"""The long form of the attack: all that the short one does, for longer, with a seed of its own; and overload, soak,
disconnects and killed processes.

    make attack                            # 20 minutes
    make attack ARGS="--minutes 3"

Prints the table of docs/security.md with what was measured, and exits with 1 where a bound was broken. Latencies under
overload are printed and not judged on a machine without a core to spare for the load: see `overload`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.attack import corpus, raw
from tests.attack.hosts import Host, private_urls, redirect, reply
from tests.attack.payloads import payloads
from tests.attack.sending import asks, head_of, post
from tests.attack.target import EVIL, GOOD, KEY, MB, Bound, Measured, Target
from tests.support.live import chat_body

ALLOWED = {200, 400, 404, 408, 413, 415, 422, 429, 503}
SPARE_CORES = 4
"""From this many cores on, the load and the server do not share them, and latencies are judged."""


@dataclass
class Row:
    """One line of the table."""

    threat: str
    figure: str
    broken: str = ""


@dataclass
class Attack:
    """What is attacked, with what, for how long. seconds: for the whole run."""

    target: Target
    seconds: float
    chance: random.Random
    rows: list[Row] = field(default_factory=list)

    @contextmanager
    def row(self, threat: str) -> Iterator[list[str]]:
        """A line of the table; its figures are what the block puts into the list."""
        print(f"... {threat}", file=sys.stderr, flush=True)
        figures: list[str] = []
        broken = ""
        try:
            yield figures
        except (AssertionError, httpx.HTTPError, TimeoutError, OSError) as error:
            broken = f"{type(error).__name__}: {str(error)[:300]}"
        try:
            self.target.settle(120)
        except (AssertionError, httpx.HTTPError) as error:
            broken += f" Afterwards: {str(error)[:300]}"
        self.rows.append(Row(threat, "; ".join(figures), broken))

    def measured(self, attack: Callable[[Measured], Any], **bounds: Any) -> Measured:
        """Raises Bound; a stall, of which a busy machine has its part, only where it comes twice."""
        for final in (False, True):
            with self.target.attack() as measured:
                attack(measured)
            try:
                measured.within(**bounds)
                return measured
            except Bound:
                if final or any("grew" in part for part in _growth(measured, bounds)):
                    raise
        raise AssertionError("not reached")


def _growth(measured: Measured, bounds: dict[str, Any]) -> list[str]:
    try:
        measured.within(**{**bounds, "stalls": False})
    except Bound as error:
        return [str(error)]
    return []


def checked(replies: list[httpx.Response | httpx.HTTPError]) -> Counter[str]:
    """How many of each status. Raises AssertionError for one that no attack may have."""
    statuses: Counter[str] = Counter()
    for answer in replies:
        assert isinstance(answer, httpx.Response), repr(answer)
        assert answer.status_code in ALLOWED, (answer.status_code, answer.text[:200])
        assert KEY not in answer.text
        statuses[str(answer.status_code)] += 1
    return statuses


def shown(worst: list[Measured]) -> str:
    growth = max(worst, key=lambda measured: measured.worst.growth)
    stall = max(measured.stalls.longest for measured in worst if measured.stalls is not None)
    return (
        f"largest growth {growth.worst.growth / MB:.0f} MB ({growth.worst.kind}, {growth.sent / MB:.1f} MB sent), "
        f"longest stall {stall * 1000:.0f} ms"
    )


def attack_bodies(attack: Attack) -> None:
    with attack.row("bodies made to be costly") as figures:
        all_measured, broken = [], []
        for payload in payloads():

            def send(measured: Measured, payload: Any = payload) -> None:
                measured.sent = len(payload.body)
                kind = {"content-type": payload.content_type}
                checked(asyncio.run(post(attack.target, [payload.body], payload.path, headers=kind)))

            try:
                all_measured.append(attack.measured(send))
            except AssertionError as error:
                broken.append(f"{payload.name}: {error}")
        figures.append(f"{len(all_measured) + len(broken)} bodies, {shown(all_measured)}")
        assert not broken, broken


def attack_images(attack: Attack, seconds: float) -> None:
    with attack.row("hostile images") as figures:
        all_measured, broken = [], []
        count = 0
        for name, image in corpus.hostile():
            count += 1

            def send(measured: Measured, image: bytes = image) -> None:
                bodies = [asks(image), asks(image + b"\0", image + b"\1")]
                measured.sent = sum(map(len, bodies))
                checked(asyncio.run(post(attack.target, bodies)))

            try:
                all_measured.append(attack.measured(send))
            except AssertionError as error:
                broken.append(f"{name}: {error}")
        figures.append(f"{count} images, {shown(all_measured)}")
        assert not broken, broken
    with attack.row("mutated images") as figures:
        statuses: Counter[str] = Counter()
        all_measured = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            images_of_batch = list(corpus.mutations(attack.chance.randrange(2**32), 250))

            def send_all(measured: Measured, images: list[tuple[str, bytes]] = images_of_batch) -> None:
                bodies = [asks(image) for _, image in images]
                measured.sent = sum(map(len, bodies))
                statuses.update(checked(asyncio.run(post(attack.target, bodies, at_once=16))))

            all_measured.append(attack.measured(send_all))
            attack.target.question()
        figures.append(f"{statuses.total()} images ({dict(statuses)}), {shown(all_measured)}")


def attack_http(attack: Attack) -> None:
    tricks = list(raw.tricks())
    with attack.row("what is hardly HTTP") as figures:

        async def send_all() -> list[list[int]]:
            return await asyncio.gather(*(raw.send(attack.target.address, trick) for trick in tricks))

        def send(measured: Measured) -> None:
            measured.sent = sum(len(trick.data) for trick in tricks)
            for trick, statuses in zip(tricks, asyncio.run(send_all()), strict=True):
                assert len(statuses) <= trick.most, (trick.name, statuses)
                assert all(status < 500 for status in statuses), (trick.name, statuses)

        figures.append(f"{len(tricks)} tricks, {shown([attack.measured(send)])}")


def attack_fetching(attack: Attack) -> None:
    image = reply(next(data for _, data in corpus.good() if data.startswith(b"\x89PNG")))
    with attack.row("image URLs of private addresses") as figures, Host("127.0.0.1", image) as private:
        urls = private_urls(private.port)
        with Host(GOOD, redirect(private.url)) as good:
            checked(asyncio.run(post(attack.target, [asks(url) for url in [*urls, good.url]], at_once=16)))
        assert not private.connections, f"{len(private.connections)} connections reached a private address"
        figures.append(f"{len(urls) + 1} URLs, 0 connections")
    with (
        attack.row("a host that does not answer") as figures,
        Host(EVIL, None) as silent,
        Host(GOOD, image) as good,
    ):

        async def ask() -> int:
            bodies = [asks(f"{silent.url}?{number}") for number in range(48)]
            waiting = asyncio.create_task(post(attack.target, bodies, at_once=48))
            await asyncio.sleep(1)
            checked(await post(attack.target, [asks(good.url)]))
            done = waiting.done()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert not done, "another host's image waited for the silent one"
            return len(silent.connections)

        figures.append(f"{asyncio.run(ask())} connections to it at a time; another host's image did not wait")


def attack_slowly(attack: Attack) -> None:
    target = attack.target
    head = head_of(28 * MB)

    async def all_but_a_byte() -> asyncio.StreamWriter:
        _, writer = await asyncio.open_connection(*target.address)
        try:
            writer.write(head)
            for _ in range(27):
                writer.write(bytes(MB))
                await asyncio.wait_for(writer.drain(), 20)
        except (OSError, TimeoutError):
            pass
        return writer

    async def hold(count: int) -> None:
        for writer in await asyncio.gather(*(all_but_a_byte() for _ in range(count))):
            writer.transport.abort()

    async def byte_by_byte(count: int) -> None:
        writers = [(await asyncio.open_connection(*target.address))[1] for _ in range(count)]
        for place in range(60):
            for writer in writers:
                writer.write(head[place : place + 1])
            await asyncio.sleep(0.05)
        for writer in writers:
            writer.transport.abort()

    with attack.row("bodies that do not end") as figures:
        measured = attack.measured(lambda _: asyncio.run(hold(24)), allowed=(192 + 50) * MB)
        figures.append(f"24 clients with 27 MB each: {shown([measured])}")
    with attack.row("heads that come byte by byte") as figures:
        figures.append(f"300 connections: {shown([attack.measured(lambda _: asyncio.run(byte_by_byte(300)))])}")


def attack_by_leaving(attack: Attack, count: int) -> None:
    body = asks(next(data for _, data in corpus.good()), tokens=200)
    request = head_of(len(body)) + body

    async def leave(number: int) -> None:
        _, writer = await asyncio.open_connection(*attack.target.address)
        writer.write(request[: attack.chance.randrange(len(request))] if number % 3 == 0 else request)
        await writer.drain()
        await asyncio.sleep(attack.chance.random() / 5)
        writer.transport.abort()

    async def leave_all() -> None:
        for start in range(0, count, 40):
            await asyncio.gather(*map(leave, range(start, min(count, start + 40))))

    def send(measured: Measured) -> None:
        measured.sent = count * len(request)
        asyncio.run(leave_all())

    with attack.row("clients that leave") as figures:
        figures.append(f"{count} clients: {shown([attack.measured(send)])}; nothing left over")


def attack_sessions(attack: Attack, count: int) -> None:
    body = json.dumps({"requestType": "NEW_SESSION"}).encode()

    def send(measured: Measured) -> None:
        measured.sent = count * len(body)
        checked(asyncio.run(post(attack.target, [body] * count, "/invocations", at_once=32)))

    with attack.row("floods of sessions") as figures:
        figures.append(f"{count} opened: {shown([attack.measured(send)])}")


def attack_with_load(attack: Attack, seconds: float) -> None:
    """Ten times what the server answers."""
    target = attack.target
    body = asks(next(data for _, data in corpus.good() if data.startswith(b"\x89PNG")), tokens=16)

    def load(rate: float, seconds: float) -> dict[str, Any]:
        command = [
            sys.executable,
            "-m",
            "tests.attack.overload",
            *map(str, target.address),
            str(rate),
            str(seconds),
        ]
        done = subprocess.run(command, input=body, capture_output=True, check=True, timeout=seconds + 120)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    began = time.monotonic()
    asyncio.run(post(target, [body] * 200, at_once=16))
    capacity = 200 / (time.monotonic() - began)
    with attack.row("ten times as many requests as can be answered") as figures:
        with target.attack() as measured:
            found = load(10 * capacity, seconds)
        statuses, times = found["statuses"], found["p50_p99"]
        for kind, name in (("429", "a 429"), ("ping", "/ping"), ("200", "an answer")):
            p50, p99 = times[kind]
            if p50 is not None:
                figures.append(f"{name} within {p50 * 1000:.0f} ms (p50), {p99 * 1000:.0f} ms (p99)")
        figures.insert(0, f"{10 * capacity:.0f} requests/s: {statuses}")
        figures.append(f"{measured.worst.kind} grew by {measured.worst.growth / MB:.0f} MB")
        strange = set(statuses) - {"200", "429", "ping 200"}
        cores = os.cpu_count() or 1
        if cores >= SPARE_CORES:
            assert not strange, statuses
            assert times["429"][1] is None or times["429"][1] <= 0.25, times
            assert times["ping"][1] <= 0.1, times
        else:
            figures.append(f"not judged: the load shares {cores} cores with the server")


def attack_processes(attack: Attack) -> None:
    """Kill and stop each kind of child, under traffic."""
    target = attack.target
    body = asks(next(data for _, data in corpus.good()), tokens=50)
    kinds = sorted({_kind(child) for child in target.tree()[1:]})
    for number in (signal.SIGKILL, signal.SIGSTOP):
        for kind in kinds:
            with attack.row(f"{number.name} of {kind}") as figures:
                victims = [child for child in target.tree()[1:] if _kind(child) == kind]
                if not victims:
                    figures.append("none runs")
                    continue

                async def kill(victims: list[psutil.Process] = victims, number: int = number) -> Counter[str]:
                    running = asyncio.create_task(post(target, [body] * 60, at_once=16))
                    await asyncio.sleep(0.2)
                    for victim in victims:
                        victim.send_signal(number)
                    replies = await running
                    assert all(isinstance(answer, httpx.Response) for answer in replies), replies
                    return Counter(str(answer.status_code) for answer in replies if isinstance(answer, httpx.Response))

                statuses = asyncio.run(kill())
                assert set(statuses) <= {"200", "429", "500", "503", "408"}, statuses
                end = time.monotonic() + 180
                while target.http.get("/ping").status_code != 200:
                    assert time.monotonic() < end, "it did not come back"
                    time.sleep(0.2)
                refused = _until_answered(target, end)
                figures.append(
                    f"60 requests under way: {dict(statuses)}; all answered, and it serves again after {refused} more "
                    "that were refused"
                )


def _until_answered(target: Target, end: float) -> int:
    """How many questions were not answered before one was: what stands still is found out by those who wait for it."""
    for refused in range(100):
        try:
            target.question()
            return refused
        except AssertionError:
            if time.monotonic() > end:
                raise
    raise AssertionError("100 questions were not answered")


def _kind(process: psutil.Process) -> str:
    command = process.cmdline()
    return command[command.index("-m") + 1] if "-m" in command[:-1] else process.name()


def soak(attack: Attack, seconds: float) -> None:
    """Good and hostile requests together. Judged by what has grown since its first fifth."""
    target = attack.target
    bodies = [asks(data) for _, data in itertools.islice(corpus.hostile(), 200) if len(data) < MB // 4]
    bodies += [asks(data) for _, data in corpus.mutations(attack.chance.randrange(2**32), 500)]
    bodies += [
        b"{",
        b"[]",
        b'{"prompt":1}',
        *(json.dumps(chat_body("hi", n=n)).encode() for n in (-1, 2, 500)),
    ]

    def resident() -> int:
        return sum(process.memory_info().rss for process in target.tree())

    with attack.row("hours of mixed traffic") as figures:
        began, asked, first = time.monotonic(), 0, 0
        while time.monotonic() < began + seconds:
            batch = attack.chance.sample(bodies, min(100, len(bodies)))
            checked(asyncio.run(post(target, batch, at_once=12)))
            target.question()
            asked += len(batch) + 1
            if not first and time.monotonic() > began + seconds / 5:
                first = resident()
        grown = resident() - first
        figures.append(
            f"{asked} requests in {seconds / 60:.1f} minutes; all processes grew by {grown / MB:.0f} MB after"
        )
        figures.append(f"{target.tree()[0].num_fds()} descriptors, {target.tree()[0].num_threads()} threads in front")
        assert grown < 100 * MB, f"{grown / MB:.0f} MB"


def table(rows: list[Row]) -> str:
    lines = ["| attack | measured |", "|---|---|"]
    for row in rows:
        broken = f" **BROKEN: {row.broken}**" if row.broken else ""
        lines.append(f"| {row.threat} | {row.figure}{broken} |".replace("\n", " "))
    return "\n".join(lines)


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    memory = psutil.virtual_memory().total / 2**30
    return f"{os.cpu_count()} cores ({name}), {memory:.0f} GiB, Python {platform.python_version()}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attack.long", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="for all of it (%(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of mutations; random, and printed, by default")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}; {machine()}", flush=True)
    seconds = 60 * arguments.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server is ended, too
    options = ("engine_stuck_timeout=15", "retry_threshold=20")
    with tempfile.TemporaryDirectory() as folder, Target(Path(folder), *options) as target:
        attack = Attack(target, seconds, random.Random(seed))
        began = time.monotonic()
        attack_bodies(attack)
        attack_images(attack, seconds * 0.15)
        attack_http(attack)
        attack_fetching(attack)
        attack_slowly(attack)
        attack_by_leaving(attack, 2000 if arguments.minutes >= 10 else 400)
        attack_sessions(attack, 5000 if arguments.minutes >= 10 else 1000)
        attack_with_load(attack, seconds * 0.05)
        attack_processes(attack)
        soak(attack, max(20.0, seconds - (time.monotonic() - began)))
        with attack.row("forged lines of the log") as figures:
            figures.append(f"{len(target.logged())} lines, each a JSON object")
        processes = target.tree()
    left = [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    for process in left:
        attack.rows.append(Row("processes left behind", "", f"{process.pid} {process.cmdline()}"))
    print(table(attack.rows))
    return 1 if any(row.broken for row in attack.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
