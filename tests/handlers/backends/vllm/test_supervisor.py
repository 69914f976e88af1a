"""The watch over vLLM's engine, with engines whose deaths and silences are scripted: no vLLM is needed."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from handlers.backends.vllm.probes import Counters
from handlers.backends.vllm.supervisor import EngineSupervisor


class ScriptedEngine:
    """answers: whether a replica answers a question for a token."""

    dead_error = RuntimeError("dead")

    def __init__(self, replicas: int = 1, processes: list[Any] | None = None) -> None:
        self.errored = False
        self.answers = [True] * replicas
        self.shut_down = False
        self.told: list[Exception] = []
        self.output_processor = SimpleNamespace(propagate_error=self.told.append)
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=replicas))
        manager = SimpleNamespace(processes=processes or [])
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager, coordinator=None))
        self.output_handler = None

    def shutdown(self, timeout: float | None = None) -> None:
        self.shut_down = True


class House:
    """Builds scripted engines; `fail` counts how many of the next ones cannot be built.

    full: who asks one for a token is refused; `refused` counts them. dropped: vLLM drops the question.
    """

    def __init__(self, replicas: int = 1, stuck: float = 60.0, **options: Any) -> None:
        self.built: list[ScriptedEngine] = []
        self.replicas = replicas
        self.fail = 0
        self.error: Exception = RuntimeError("no memory")
        self.full = self.dropped = False
        self.refused = 0
        self.process: Any = None
        """What the next engine is."""
        self.counters = Counters()
        self.supervisor = EngineSupervisor(
            self.build,
            self.ask,
            self.counters,
            suspect_seconds=0.04,
            stuck_seconds=stuck,
            idle_seconds=0.05,
            look_seconds=0.005,
            first_pause_seconds=0.001,
            **options,
        )

    def build(self) -> ScriptedEngine:
        if self.fail:
            self.fail -= 1
            raise self.error
        process, self.process = self.process, None
        self.built.append(ScriptedEngine(self.replicas, [process] if process else []))
        return self.built[-1]

    async def ask(self, engine: ScriptedEngine, replica: int) -> None:
        if self.full:
            self.refused += 1
            raise RuntimeError("the queue is full")
        if self.dropped:
            raise asyncio.CancelledError
        if not engine.answers[replica]:
            await asyncio.Event().wait()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110 - the supervisor itself looks at intervals
            await asyncio.sleep(0.002)


def run(scenario: Any) -> None:
    asyncio.run(scenario())


def test_a_dead_engine_is_replaced() -> None:
    async def scenario() -> None:
        house = House()
        await house.supervisor.start()
        assert house.supervisor.health().ready
        house.built[0].errored = True
        assert not house.supervisor.health().ready, "at once, before anybody has looked"
        assert "restarted" in house.supervisor.health().reason
        await until(lambda: house.supervisor.health().ready)
        assert house.supervisor.engine is house.built[1]
        assert house.built[0].shut_down
        assert house.supervisor.restarts == 1
        await house.supervisor.close()
        assert house.built[1].shut_down

    run(scenario)


def test_a_silent_engine_is_suspected_then_replaced() -> None:
    async def scenario() -> None:
        house = House(stuck=1.0)
        await house.supervisor.start()
        house.built[0].answers = [False]
        await until(lambda: house.supervisor.health().reason == "the engine does not answer")
        assert not house.built[0].told
        await until(lambda: len(house.built) == 2 and house.supervisor.health().ready)
        assert house.built[0].shut_down
        assert house.built[0].told, "its requests hear of it"
        await house.supervisor.close()

    run(scenario)


def test_a_silent_replica_is_noticed_while_another_answers() -> None:
    async def scenario() -> None:
        house = House(replicas=2, stuck=1.0)
        await house.supervisor.start()
        house.supervisor.in_flight = 1
        house.built[0].answers[1] = False
        suspected = False
        async with asyncio.timeout(60):
            while len(house.built) < 2:
                house.counters.signs[0] = time.monotonic()
                suspected |= house.supervisor.health().reason == "the engine does not answer"
                await asyncio.sleep(0.005)
        assert suspected
        assert house.built[0].shut_down
        await until(lambda: house.supervisor.health().ready)
        await house.supervisor.close()

    run(scenario)


def test_a_word_about_any_request_clears_the_suspicion() -> None:
    async def scenario() -> None:
        house = House(stuck=1.0)
        await house.supervisor.start()
        house.supervisor.in_flight = 1
        house.built[0].answers = [False]
        for _ in range(150):
            house.counters.signs[0] = time.monotonic()
            await asyncio.sleep(0.01)
        assert len(house.built) == 1
        await house.supervisor.close()

    run(scenario)


def test_a_silent_engine_whose_queue_is_full_is_replaced() -> None:
    async def scenario() -> None:
        house = House(stuck=1.0)
        await house.supervisor.start()
        house.supervisor.in_flight = 1
        house.full = True
        await until(lambda: house.supervisor.health().reason == "the engine does not answer")
        await until(lambda: bool(house.built[0].told))
        house.full = False
        await until(lambda: len(house.built) == 2 and house.supervisor.health().ready)
        await house.supervisor.close()

    run(scenario)


def test_who_was_refused_asks_again() -> None:
    async def scenario() -> None:
        house = House()
        await house.supervisor.start()
        house.full = True
        await until(lambda: house.supervisor.health().reason == "the engine does not answer")
        house.full = False
        await until(lambda: house.supervisor.health().ready)
        assert len(house.built) == 1
        await house.supervisor.close()

    run(scenario)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_question_that_vllm_drops_is_no_answer(replicas: int) -> None:
    async def scenario() -> None:
        house = House(replicas, stuck=1.0)
        await house.supervisor.start()
        house.dropped = True
        await until(lambda: house.supervisor.health().reason == "the engine does not answer")
        await until(lambda: bool(house.built[0].told))
        house.dropped = False
        await until(lambda: len(house.built) == 2 and house.supervisor.health().ready)
        await house.supervisor.close()

    run(scenario)


def test_a_question_that_vllm_drops_is_asked_again() -> None:
    async def scenario() -> None:
        house = House()
        await house.supervisor.start()
        house.dropped = True
        await until(lambda: house.supervisor.health().reason == "the engine does not answer")
        house.dropped = False
        await until(lambda: house.supervisor.health().ready)
        assert len(house.built) == 1
        await house.supervisor.close()

    run(scenario)


def test_a_full_queue_says_nothing_of_one_replica_of_several() -> None:
    async def scenario() -> None:
        house = House(replicas=2, stuck=0.02)
        await house.supervisor.start()
        house.full = True
        await until(lambda: house.refused > 10)
        assert house.supervisor.health().ready
        assert len(house.built) == 1
        await house.supervisor.close()

    run(scenario)


def test_after_too_many_failures_it_is_lost() -> None:
    async def scenario() -> None:
        house = House(retry_threshold=2)
        await house.supervisor.start()
        house.fail = 5
        house.built[0].errored = True
        await until(lambda: house.supervisor.given_up)
        health = house.supervisor.health()
        assert (health.ready, health.lost) == (False, True)
        assert house.supervisor.restarts == 2
        await house.supervisor.close()

    run(scenario)


def test_an_answered_request_forgives_earlier_failures() -> None:
    async def scenario() -> None:
        house = House(retry_threshold=1)
        await house.supervisor.start()
        for number in range(4):
            house.supervisor.answered = True
            house.built[number].errored = True
            await until(lambda number=number: len(house.built) == number + 2 and house.supervisor.health().ready)
        assert not house.supervisor.given_up
        house.built[4].errored = True
        await until(lambda: house.supervisor.given_up)
        await house.supervisor.close()

    run(scenario)


def test_what_the_first_engine_fails_with_is_told() -> None:
    async def scenario() -> None:
        house = House()
        house.fail = 1
        with pytest.raises(RuntimeError, match="no memory"):
            await house.supervisor.start()
        await house.supervisor.close()
        await house.supervisor.close()

    run(scenario)


def test_a_dead_process_is_noticed_before_vllm_tells_and_the_others_are_not_touched() -> None:
    async def scenario() -> None:
        spawn = multiprocessing.get_context("spawn")
        mine, engine = (spawn.Process(target=time.sleep, args=(60,), daemon=True) for _ in range(2))
        another = await asyncio.create_subprocess_exec("sleep", "60")
        mine.start()
        engine.start()
        house = House()
        house.process = engine
        await house.supervisor.start()
        engine.kill()
        await until(lambda: len(house.built) == 2 and house.supervisor.health().ready)
        assert house.built[0].told
        assert not house.built[0].errored, "vLLM has told nothing"
        await house.supervisor.close()
        assert mine.is_alive()
        assert another.returncode is None
        mine.kill()
        another.kill()
        mine.join()
        await another.wait()

    run(scenario)


def test_what_a_start_that_fails_leaves_is_ended_alone() -> None:
    async def scenario() -> None:
        spawn = multiprocessing.get_context("spawn")
        mine = spawn.Process(target=time.sleep, args=(60,), daemon=True)
        mine.start()
        started: list[Any] = []

        def build() -> None:
            # A thread of the user's starts something meanwhile.
            for name in ("EngineCore", "reader"):
                process = spawn.Process(target=time.sleep, args=(60,), name=name, daemon=True)
                process.start()
                started.append(process)
            raise RuntimeError("no memory")

        async def ask(engine: Any, replica: int) -> None:
            pass

        supervisor = EngineSupervisor(build, ask, Counters())
        with pytest.raises(RuntimeError, match="no memory"):
            await supervisor.start()
        engine, reader = started
        assert not engine.is_alive()
        await supervisor.close()
        assert mine.is_alive()
        assert reader.is_alive()
        for process in (mine, reader):
            process.kill()
            process.join()

    run(scenario)


def test_a_shortage_of_this_machine_is_waited_for_and_not_counted() -> None:
    async def scenario() -> None:
        house = House(retry_threshold=1)
        await house.supervisor.start()
        house.error = OSError(errno.EMFILE, "Too many open files")
        house.fail = 6
        house.built[0].errored = True
        await until(lambda: house.supervisor.restarts > 3)
        health = house.supervisor.health()
        assert (health.ready, health.lost) == (False, False)
        assert health.reason.endswith("the server is short of file descriptors")
        await until(lambda: house.supervisor.health().ready)
        await house.supervisor.close()

    run(scenario)
