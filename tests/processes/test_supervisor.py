"""What keeps a child running: the next is started when one is lost, and none when it fails too often."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from processes.supervisor import Supervisor, why_down


class Scripted:
    """Lost when `loss` says why."""

    def __init__(self) -> None:
        self.served = False
        self.loss: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.stops = 0

    async def lost(self) -> str:
        return await self.loss

    async def stop(self) -> None:
        self.stops += 1
        await asyncio.sleep(0)


class House:
    """errors: what the next starts fail with. hanging: whether they never end."""

    def __init__(self, retry_threshold: int = 3, **options: Any) -> None:
        self.made: list[Scripted] = []
        self.errors: list[Exception] = []
        self.hanging = False
        self.news = asyncio.Event()
        options |= {"retry_threshold": retry_threshold, "first_pause_seconds": 0.001}
        self.supervisor = Supervisor("it", self.start, changed=self.news.set, **options)

    async def start(self) -> Scripted:
        if self.errors:
            raise self.errors.pop(0)
        if self.hanging:
            await asyncio.Event().wait()
        self.made.append(Scripted())
        return self.made[-1]

    async def lose(self, reason: str = "ended", *, served: bool = False) -> None:
        """Returns when there is another one, or none any more."""
        one = self.made[-1]
        one.served = served
        one.loss.set_result(reason)
        async with asyncio.timeout(10):
            while self.supervisor.current in (one, None) and not self.supervisor.given_up:
                self.news.clear()
                await self.news.wait()


def run(scenario: Any) -> None:
    asyncio.run(scenario())


def test_the_next_one_is_started_when_one_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        house = House()
        first = await house.supervisor.start()
        await house.lose("ended with code -9")
        assert house.supervisor.current is house.made[1]
        assert first.stops == 1
        assert house.supervisor.restarts == 1
        await house.supervisor.close()
        await house.supervisor.close()
        assert house.supervisor.current is None
        assert house.made[1].stops == 1

    caplog.set_level("INFO")
    run(scenario)
    assert [record.getMessage() for record in caplog.records] == ["it ended with code -9", "it is back"]


def test_it_is_given_up_after_one_failure_more_than_the_threshold() -> None:
    async def scenario() -> None:
        house = House(retry_threshold=2)
        await house.supervisor.start()
        await house.lose()
        assert house.supervisor.reason("the engine") == "the engine is being restarted"
        house.errors = [ValueError("its own"), ValueError("its own")]
        await house.lose()
        assert house.supervisor.given_up
        assert house.supervisor.current is None
        assert house.supervisor.restarts == 2
        assert house.supervisor.reason("the engine") == "the engine failed too often"

    run(scenario)


def test_one_that_has_served_forgives_the_failures_before() -> None:
    async def scenario() -> None:
        house = House(retry_threshold=1)
        await house.supervisor.start()
        for _ in range(5):
            await house.lose(served=True)
        assert not house.supervisor.given_up
        await house.lose()
        assert house.supervisor.given_up

    run(scenario)


def test_a_shortage_is_waited_for_and_not_counted() -> None:
    async def scenario() -> None:
        house = House(retry_threshold=1)
        await house.supervisor.start()
        house.errors = [OSError(errno.EMFILE, "Too many open files")] * 6
        reasons = set()

        async def watch() -> None:
            while True:
                reasons.add(house.supervisor.reason("the engine"))
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        await house.lose(served=True)
        watching.cancel()
        assert house.supervisor.current is house.made[1]
        assert house.supervisor.restarts == 7
        assert reasons == {
            "the engine is being restarted",
            "the engine is restarted as soon as it can be: the server is short of file descriptors",
        }
        await house.supervisor.close()

    run(scenario)


def test_a_start_that_takes_too_long_is_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        house = House(retry_threshold=1, start_seconds=0.01)
        await house.supervisor.start()
        house.hanging = True
        await house.lose()
        assert house.supervisor.given_up

    run(scenario)
    assert "it did not start again: TimeoutError" in caplog.messages


def test_a_start_in_the_background_is_tried_again_and_is_no_restart(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        house = House()
        house.errors = [ValueError("no memory"), ValueError("no memory")]
        house.supervisor.start_later()
        await house.news.wait()
        assert house.supervisor.current is house.made[0]
        assert house.supervisor.restarts == 0
        await house.lose(served=True)
        assert house.supervisor.restarts == 1
        await house.supervisor.close()

    caplog.set_level("INFO")
    run(scenario)
    assert caplog.messages == [*["it did not start: no memory"] * 2, "it is ready", "it ended", "it is back"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_close_ends_a_start_in_the_background(begun: bool) -> None:
    async def scenario() -> None:
        house = House()
        house.hanging = True
        house.supervisor.start_later()
        if begun:
            await asyncio.sleep(0.01)
        await house.supervisor.close()
        assert not house.made
        assert house.supervisor.current is None

    run(scenario)


def test_what_the_first_start_fails_with_is_raised() -> None:
    async def scenario() -> None:
        house = House()
        house.errors = [ValueError("no such model")]
        with pytest.raises(ValueError, match="no such model"):
            await house.supervisor.start()
        await house.supervisor.close()

    run(scenario)


def test_one_that_is_being_stopped_is_stopped_to_its_end_by_a_close() -> None:
    async def scenario() -> None:
        house = House()
        first = await house.supervisor.start()
        stopping = asyncio.Event()

        async def stop() -> None:
            first.stops += 1
            stopping.set()
            if first.stops == 1:
                await asyncio.Event().wait()

        first.stop = stop  # type: ignore[method-assign]
        first.loss.set_result("ended")
        await stopping.wait()
        await house.supervisor.close()
        assert first.stops == 2
        assert len(house.made) == 1

    run(scenario)


def test_the_reason_of_several_is_that_of_one_which_may_come_back() -> None:
    async def scenario() -> None:
        lost, short = House(retry_threshold=0), House()
        for house in (lost, short):
            await house.supervisor.start()
        await lost.lose()
        short.errors = [OSError(errno.ENOMEM, "")] * 1000
        short.made[-1].loss.set_result("ended")
        async with asyncio.timeout(10):
            while short.supervisor.short is None:  # noqa: ASYNC110
                await asyncio.sleep(0)
        supervisors = [lost.supervisor, short.supervisor]
        assert why_down(supervisors, "it").endswith("short of memory")
        assert why_down(supervisors[:1], "it") == "it failed too often"
        await short.supervisor.close()

    run(scenario)
