"""The watch over vLLM's engine, with engines whose deaths and silences are scripted: no vLLM is needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from handlers.backends.vllm import keeper as module
from handlers.backends.vllm.counters import Counters
from handlers.backends.vllm.keeper import EngineKeeper


class ScriptedEngine:
    """answers: whether a question for a token is answered."""

    def __init__(self, answers: bool = True) -> None:
        self.errored = False
        self.answers = answers
        self.shut_down = False

    async def reset_mm_cache(self) -> None:
        pass

    def shutdown(self, timeout: float | None = None) -> None:
        self.shut_down = True


class House:
    """Builds scripted engines; `fail` counts how many of the next ones cannot be built."""

    def __init__(self, **options: Any) -> None:
        self.built: list[ScriptedEngine] = []
        self.fail = 0
        self.counters = Counters()
        self.keeper = EngineKeeper(self.build, self.ask, self.counters, **options)

    def build(self) -> ScriptedEngine:
        if self.fail:
            self.fail -= 1
            raise RuntimeError("no memory")
        self.built.append(ScriptedEngine())
        return self.built[-1]

    async def ask(self, engine: ScriptedEngine) -> None:
        if not engine.answers:
            await asyncio.Event().wait()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (
        ("LOOK_SECONDS", 0.005), ("QUIET_SECONDS", 0.05), ("IDLE_SECONDS", 0.05), ("SUSPECT_SECONDS", 0.02),
        ("FIRST_PAUSE_SECONDS", 0.001),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, seconds)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110 - the keeper itself looks at intervals
            await asyncio.sleep(0.002)


def run(scenario: Any) -> None:
    asyncio.run(scenario())


def test_a_dead_engine_is_replaced() -> None:
    async def scenario() -> None:
        house = House()
        await house.keeper.start()
        assert house.keeper.health().ready
        house.built[0].errored = True
        assert not house.keeper.health().ready, "at once, before anybody has looked"
        assert "restarted" in house.keeper.health().reason
        await until(lambda: house.keeper.health().ready)
        assert house.keeper.engine is house.built[1]
        assert house.built[0].shut_down
        assert house.keeper.restarts == 1
        await house.keeper.close()
        assert house.built[1].shut_down

    run(scenario)


def test_a_silent_engine_is_suspected_then_replaced() -> None:
    async def scenario() -> None:
        house = House(stuck_seconds=0.2)
        await house.keeper.start()
        house.built[0].answers = False
        await until(lambda: house.keeper.health().reason == "the engine does not answer")
        await until(lambda: len(house.built) == 2 and house.keeper.health().ready)
        assert house.built[0].shut_down
        await house.keeper.close()

    run(scenario)


def test_a_word_about_any_request_clears_the_suspicion() -> None:
    async def scenario() -> None:
        house = House(stuck_seconds=0.3)
        await house.keeper.start()
        house.keeper.in_flight = 1
        house.built[0].answers = False
        for _ in range(50):
            house.counters.last_sign = asyncio.get_running_loop().time()
            await asyncio.sleep(0.01)
        assert len(house.built) == 1
        await house.keeper.close()

    run(scenario)


def test_after_too_many_failures_it_is_lost() -> None:
    async def scenario() -> None:
        house = House(retry_threshold=2)
        await house.keeper.start()
        house.fail = 5
        house.built[0].errored = True
        await until(lambda: house.keeper.given_up)
        health = house.keeper.health()
        assert (health.ready, health.lost) == (False, True)
        assert house.keeper.restarts == 2
        await house.keeper.close()

    run(scenario)


def test_an_answered_request_forgives_earlier_failures() -> None:
    async def scenario() -> None:
        house = House(retry_threshold=1)
        await house.keeper.start()
        for number in range(4):
            house.keeper.answered = True
            house.built[number].errored = True
            await until(lambda number=number: len(house.built) == number + 2 and house.keeper.health().ready)
        assert not house.keeper.given_up
        house.built[4].errored = True
        await until(lambda: house.keeper.given_up)
        await house.keeper.close()

    run(scenario)


def test_what_the_first_engine_fails_with_is_told() -> None:
    async def scenario() -> None:
        house = House()
        house.fail = 1
        with pytest.raises(RuntimeError, match="no memory"):
            await house.keeper.start()
        await house.keeper.close()
        await house.keeper.close()

    run(scenario)
