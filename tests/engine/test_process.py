"""The engine as it runs in production: its own processes, started, spoken to, split over ranks, and killed."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.config import EngineConfig
from engine.errors import EngineDead, EngineStopped, ModelLoadError, RequestRejected
from engine.messages import Add
from engine.sampling_params import SamplingParams
from handlers import progress
from handlers.backends.rolling.engine_client import EngineClient, EngineProcess, OutputStream
from handlers.backends.rolling.replicas import EngineGroup
from tests.support.engine_driver import EOS, Oracle, Prompt, random_image
from tests.support.engine_process import answer, config, finish, running, started
from tests.support.models import make_llava


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def oracle(llava: Path) -> Oracle:
    return Oracle(llava)


Kept = tuple[asyncio.Runner, EngineClient]
"""An engine that several tests share, and the loop that its client lives in."""


@contextmanager
def kept(config: EngineConfig) -> Iterator[Kept]:
    with asyncio.Runner() as runner:
        client = runner.run(started(config))
        try:
            yield runner, client
        finally:
            runner.run(client.stop())


@pytest.fixture(scope="module")
def one_rank(llava: Path) -> Iterator[Kept]:
    with kept(config(llava)) as found:
        yield found


@pytest.fixture(scope="module")
def two_ranks(llava: Path) -> Iterator[Kept]:
    with kept(config(llava, devices=("cpu", "cpu"))) as found:
        yield found


@asynccontextmanager
async def running_group(
    configs: Sequence[EngineConfig], *, wait_for_all: bool = True, **settings: float
) -> AsyncIterator[EngineGroup]:
    group = EngineGroup(configs, **settings)  # type: ignore[arg-type]
    await group.start(wait_for_all=wait_for_all)
    try:
        yield group
    finally:
        await group.close()


def endless(tokens: int = 400) -> Add:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return Add(0, [5, 6, 7], params, [0], EOS)


async def fails(stream: OutputStream) -> None:
    """Read on until the stream fails with EngineDead."""
    for _ in range(10_000):
        try:
            await stream.get()
        except EngineDead:
            return
    pytest.fail("the stream did not fail")


PROMPTS = [Prompt([1, 2, 3]), Prompt([9, random_image(1), 4, 5]), Prompt([random_image(2), 7, random_image(1), 8])]


@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])
def test_tokens_are_right_whatever_the_number_of_ranks(
    request: pytest.FixtureRequest, oracle: Oracle, ranks: str
) -> None:
    runner, client = request.getfixturevalue(ranks)

    async def scenario() -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=20)
        adds = [prompt.add(oracle.preprocessor, params) for prompt in PROMPTS * 3]
        return list(await asyncio.gather(*(answer(client, add) for add in adds)))

    got = runner.run(scenario())
    want = [oracle.generate(prompt, 20) for prompt in PROMPTS]
    assert got == want * 3


def test_further_replicas_start_behind_the_first_and_share_the_cores(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, float]] = []
    send = EngineClient.use_cores

    def use_cores(client: EngineClient, share: float) -> None:
        told.append((client.pid, share))
        send(client, share)

    monkeypatch.setattr(EngineClient, "use_cores", use_cores)

    async def scenario() -> None:
        async with running_group([config(llava)] * 2, wait_for_all=False) as group:
            assert len(group.alive) == 1
            assert await finish(group.submit(endless(3)))
            while len(group.alive) == 1:
                await group.changed()
            pids = [replica.client.pid for replica in group.replicas]
            told.clear()
            streams = [group.submit(endless()) for _ in pids]
            assert told == [(pid, share) for share in (1.0, 0.5) for pid in pids]
            assert [stream.client.pid for stream in streams] == pids
            told.clear()
            streams[0].abort()
            assert told == [(pid, 1.0) for pid in pids]
            assert await finish(streams[1])
            assert group.restarts == 0

    asyncio.run(scenario())


def test_a_further_replica_that_cannot_start_is_given_up(
    llava: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        configs = [config(llava), config(tmp_path)]
        async with running_group(configs, wait_for_all=False, retry_threshold=0) as group:
            while not group.replicas[1].supervisor.given_up:
                await group.changed()
            assert await finish(group.submit(endless(3)))
            assert not group.given_up

    asyncio.run(scenario())
    assert "replica 1 did not start: " in caplog.text


def test_a_degree_that_does_not_divide_the_heads_is_refused(llava: Path) -> None:
    async def scenario() -> None:
        async with running(config(llava, devices=("cpu",) * 4)):
            pytest.fail("four ranks cannot share two key/value heads")

    with pytest.raises(ModelLoadError, match="does not divide the model's num_key_value_heads 2"):
        asyncio.run(scenario())


def test_killing_one_rank_ends_the_group_and_fails_its_requests(two_ranks: Kept) -> None:
    """The last that asks this engine."""
    runner, client = two_ranks

    async def scenario() -> None:
        stream = client.submit(endless())
        await stream.get()
        (rank,) = psutil.Process(client.pid).children()
        rank.kill()
        async with asyncio.timeout(60):
            await fails(stream)
            await client.wait_dead()

    runner.run(scenario())


def test_a_killed_engine_fails_its_requests_at_once_and_is_restarted(llava: Path) -> None:
    async def scenario() -> None:
        async with running_group([config(llava)]) as group:
            stream = group.submit(endless())
            await stream.get()
            pid = group.replicas[0].client.pid
            os.kill(pid, signal.SIGKILL)
            async with asyncio.timeout(60):
                await fails(stream)
            assert not group.alive
            with pytest.raises(EngineDead):
                group.submit(endless())
            async with asyncio.timeout(60):
                while not group.alive:
                    await group.changed()
            assert group.replicas[0].client.pid != pid
            assert group.restarts == 1
            again = group.submit(endless(5))
            assert len(await finish(again)) == 5

    asyncio.run(scenario())


def test_a_spare_process_takes_the_place_of_one_that_dies(llava: Path) -> None:
    others = {child.pid for child in psutil.Process().children()}

    async def next_spare(group: EngineGroup) -> psutil.Process:
        known = {*others, group.replicas[0].client.pid}
        async with asyncio.timeout(60):
            while not (found := [c for c in psutil.Process().children() if c.pid not in known]):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        (spare,) = found
        return spare

    async def dies(group: EngineGroup) -> None:
        changed = asyncio.create_task(group.changed())
        os.kill(group.replicas[0].client.pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            await changed
            while not group.alive:
                await group.changed()

    async def scenario() -> None:
        async with running_group([config(llava)], spare_after=0.0) as group:
            first = await next_spare(group)
            await dies(group)
            assert group.replicas[0].client.pid == first.pid
            second = await next_spare(group)
            second.kill()  # one that has died itself is of no use
            async with asyncio.timeout(60):
                while second.is_running() and second.status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            await dies(group)
            assert group.restarts == 2
            assert len(await finish(group.submit(endless(5)))) == 5
            third = await next_spare(group)
        assert not third.is_running()

    asyncio.run(scenario())


def test_an_engine_that_hangs_is_killed_and_restarted(llava: Path) -> None:
    async def scenario() -> None:
        async with running_group([config(llava)], stuck_seconds=3.0) as group:
            stream = group.submit(endless())
            await stream.get()
            pid = group.replicas[0].client.pid
            os.kill(pid, signal.SIGSTOP)
            async with asyncio.timeout(60):
                await fails(stream)
                while group.restarts == 0 or not group.alive:
                    await group.changed()
            again = group.submit(endless(3))
            assert len(await finish(again)) == 3

    asyncio.run(scenario())


def test_a_crash_loop_is_given_up_although_the_watchdog_asks_in_between(llava: Path) -> None:
    async def scenario() -> None:
        async with running_group([config(llava)], retry_threshold=1) as group:
            async with asyncio.timeout(90):
                for _ in range(2):
                    while not group.alive:
                        await group.changed()
                    assert await group.replicas[0].client.ping(30.0)
                    group.replicas[0].client.kill()
                    while group.alive:
                        await group.changed()
                while not group.given_up:
                    await group.changed()
            assert group.restarts == 1

    asyncio.run(scenario())


def test_a_restart_that_the_machine_refuses_is_tried_again(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with running_group([config(llava)]) as group:
            real, refused = asyncio.create_subprocess_exec, []

            async def refuse_once(*args: Any, **kwargs: Any) -> asyncio.subprocess.Process:
                if not refused:
                    refused.append(True)
                    raise OSError(12, "Cannot allocate memory")
                return await real(*args, **kwargs)

            monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse_once)
            group.replicas[0].client.kill()
            async with asyncio.timeout(60):
                while group.restarts < 2 or not group.alive:
                    await group.changed()

    asyncio.run(scenario())


def test_a_request_that_cannot_be_sent_leaves_nothing_behind(one_rank: Kept) -> None:
    runner, client = one_rank
    add = endless(3)
    add.seeds = [1, 2**64]
    with pytest.raises(RequestRejected):
        client.submit(add)
    assert client.num_requests == 0
    assert len(runner.run(answer(client, endless(3)))) == 3


def test_an_aborted_request_leaves_the_engine_within_a_step(one_rank: Kept) -> None:
    runner, client = one_rank

    async def scenario() -> None:
        stream = client.submit(endless())
        await stream.get()
        stream.abort()
        assert await client.ping(30.0)
        assert client.stats.running == 0
        assert client.stats.blocks_used == 0

    runner.run(scenario())


def test_an_orderly_stop_is_told_apart_from_a_crash(one_rank: Kept) -> None:
    """The last that asks this engine."""
    runner, client = one_rank

    async def scenario() -> None:
        stream = client.submit(endless())
        await client.stop()
        with pytest.raises(EngineStopped):
            await stream.get()

    runner.run(scenario())


def test_of_replicas_that_load_at_once_one_is_told_after_the_other(llava: Path) -> None:
    told: list[str] = []

    async def start() -> None:
        with progress.shown(lambda loading: told.append(str(loading)), 0.001):
            async with running_group([config(llava)] * 3):
                pass

    asyncio.run(start())
    names = [text.partition(":")[0] for text in told if text.startswith("replica ")]
    assert names
    assert names == sorted(names)


def test_two_replicas_share_the_load_and_remember_who_saw_what(llava: Path) -> None:
    async def scenario() -> None:
        async with running_group([config(llava), config(llava)]) as group:
            streams = [group.submit(endless(30)) for _ in range(8)]
            held = [replica.client.num_requests for replica in group.replicas]
            assert held == [4, 4]
            await asyncio.gather(*(finish(stream) for stream in streams))
            first = group.submit(endless(3), [b"image"])
            await finish(first)
            second = group.submit(endless(3), [b"image"])
            await finish(second)
            assert first.client is second.client

    asyncio.run(scenario())


def test_the_engine_ends_when_the_front_is_gone(llava: Path) -> None:
    async def scenario() -> int:
        client = await started(config(llava))
        client.submit(endless())
        client.process.connection.close()
        async with asyncio.timeout(60):
            await client.wait_dead()
            await client.stop()
        assert client.process.returncode is not None
        return client.process.returncode

    assert asyncio.run(scenario()) == 0


def test_a_missing_model_is_reported_with_a_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        await started(config(tmp_path))

    with pytest.raises(ModelLoadError, match=r"config\.json"):
        asyncio.run(scenario())


def test_what_a_library_prints_in_it_is_logged(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """To standard output, too, which is where the server's log goes: a bare line would be none of its form."""
    caplog.set_level(logging.INFO)

    async def run() -> None:
        engine = await EngineProcess.spawn()
        try:
            assert await engine.ask("tests.support.echoing_child:printed", b"oneDNN has something to say\n") == b"done"
        finally:
            await engine.stop()

    asyncio.run(run())
    assert "oneDNN has something to say" in [record.getMessage() for record in caplog.records]
    assert capfd.readouterr().out == ""
