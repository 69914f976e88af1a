"""Many requests through one backend that fails in ways that an engine seldom does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from handlers.backends.base import Health
from handlers.deltas import Delta
from handlers.errors import EngineFailed, InvalidRequest, ServingError, Unavailable
from handlers.offline.batch import Batch, Outcome
from handlers.protocols.base import Answered
from handlers.request import GenerationRequest, RequestSampling, TextPart, TextPrompt
from tests.support.scripted import ScriptedBackend, ScriptedGeneration, ScriptedImages, Step, said


class Mortal(ScriptedBackend):
    """down: how many looks at its health find it gone, after a request has found it so. lost: for good."""

    def __init__(self, script: Sequence[Step] = (), down: int = 0, lost: bool = False, **given: object) -> None:
        super().__init__(given.pop("answer", script))  # type: ignore[arg-type]
        self.down = down
        self.lost = lost
        self.most = 0

    async def generate(self, request: GenerationRequest) -> ScriptedGeneration:
        if self.down or self.lost:
            raise Unavailable("the engine is being restarted")
        generation = await super().generate(request)
        self.most = max(self.most, self.running)
        return generation

    def health(self) -> Health:
        self.down = max(0, self.down - 1)
        return Health(not self.down and not self.lost, "restarting", lost=self.lost)


def requests(count: int, n: int = 1) -> list[GenerationRequest]:
    return [
        GenerationRequest(str(number), TextPrompt([TextPart(str(number))]), RequestSampling(), n=n)
        for number in range(count)
    ]


def outcomes(backend: ScriptedBackend, count: int, *, window: int = 4, restart_seconds: float = 30.0) -> list[Outcome]:
    found: dict[int, Outcome] = {}

    def done(number: int, outcome: Outcome) -> None:
        assert number not in found
        found[number] = outcome

    batch = Batch(backend, ScriptedImages(), window, restart_seconds, poll_seconds=0.001)  # type: ignore[arg-type]
    asyncio.run(asyncio.wait_for(batch.run(requests(count), done), 30))
    assert backend.running == 0, "every generation is closed"
    return [found[number] for number in range(count)]


def text(outcome: Outcome) -> str:
    assert isinstance(outcome, Answered), outcome
    return outcome.answers[0].text


def test_no_more_than_the_window_are_under_way() -> None:
    backend = Mortal(answer=lambda request: [0.001, *said("a", request.request_id)])
    found = outcomes(backend, 30, window=4)
    assert [text(outcome) for outcome in found] == [f"a{number}" for number in range(30)]
    assert backend.most == 4


def test_what_a_dying_engine_held_is_asked_again_alone_and_only_the_culprit_fails() -> None:
    """Request 2 ends the engine whenever it runs, and with it what runs beside it."""
    alive = True

    def answer(request: GenerationRequest) -> list[Step]:
        nonlocal alive
        if request.request_id == "2":
            alive = False
        return [0.002, *(said("a") if alive else [EngineFailed("the engine process died")])]

    class Dies(Mortal):
        async def generate(self, request: GenerationRequest) -> ScriptedGeneration:
            nonlocal alive
            if self.running == 0:
                alive = True
            return await super().generate(request)

    backend = Dies(answer=answer)
    found = outcomes(backend, 12)
    failed = [number for number, outcome in enumerate(found) if isinstance(outcome, ServingError)]
    assert failed == [2]
    assert len(backend.requests) > 13, "others were asked twice"


def test_an_engine_that_comes_back_is_waited_for() -> None:
    assert [text(outcome) for outcome in outcomes(Mortal(said("a"), down=20), 6)] == ["a"] * 6


def test_one_that_does_not_come_back_is_given_up() -> None:
    for backend, seconds in ((Mortal(said("a"), lost=True), 30.0), (Mortal(said("a"), down=10**9), 0.02)):
        found = outcomes(backend, 6, restart_seconds=seconds)
        assert all(isinstance(outcome, Unavailable) for outcome in found)


def test_errors_of_every_kind_stay_with_their_request() -> None:
    errors = [InvalidRequest("no"), ValueError("a defect"), EngineFailed("twice")]

    def answer(request: GenerationRequest) -> list[Step]:
        number = int(request.request_id)
        return [errors[number]] if number < 3 else said("a")

    found = outcomes(Mortal(answer=answer), 5)
    assert found[0] is errors[0]
    assert isinstance(found[1], ServingError)
    assert "defect" not in str(found[1])
    assert found[2] is errors[2]
    assert [text(outcome) for outcome in found[3:]] == ["a", "a"]


@pytest.mark.parametrize("steps", [[], [Delta(0, [5], "a")], said("a", reason="abort")])
def test_an_answer_without_an_end_is_an_error(steps: list[Step]) -> None:
    (outcome,) = outcomes(ScriptedBackend(steps), 1)
    assert isinstance(outcome, EngineFailed)


def test_cancelled_it_aborts_all() -> None:
    async def main() -> None:
        backend = Mortal([60.0, *said("a")])
        batch = Batch(backend, ScriptedImages(), 4, 30.0)  # type: ignore[arg-type]
        running = asyncio.create_task(batch.run(requests(9), lambda number, outcome: None))
        for _ in range(50):
            await asyncio.sleep(0)
        assert backend.running == 4
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert backend.running == 0

    asyncio.run(main())
