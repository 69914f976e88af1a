"""While a request streams, steps stay short: prompts and images of others are spread over them. In virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.messages import Add
from engine.sampling_params import SamplingParams
from engine.step_time import FEWEST_TOKENS, StepTime
from tests.support.engine_driver import Oracle, Prompt, Result, collect, load_engine, random_image
from tests.support.models import make_llava

BOUND = 0.1
DECODE, TOKEN, IMAGE = 0.01, 0.001, 0.03
"""Seconds of a step, and beside it of each prompt token and image."""


class Clock:
    """Advances only by what the model computes."""

    def __init__(self, engine: Engine) -> None:
        self.now = 0.0
        self._run, self._encode = engine.runner.run, engine.runner.encode

    def perf_counter(self) -> float:
        return self.now

    def run(self, chunks: Sequence[Any]) -> Any:
        self.now += DECODE + TOKEN * sum(chunk.length for chunk in chunks if chunk.length > 1)
        return self._run(list(chunks))

    def encode(self, images: Sequence[Any]) -> None:
        self.now += IMAGE * len(images)
        self._encode(list(images))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def oracle(path: Path) -> Oracle:
    return Oracle(path)


def text(length: int, first: int) -> Prompt:
    return Prompt([(first + number) % 200 + 1 for number in range(length)])


def steps(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, stream: Add, others: Sequence[Add]
) -> tuple[dict[int, Result], list[float]]:
    """The results, and how long each step took while the first request, which begins alone, streamed."""
    clock = Clock(engine)
    monkeypatch.setattr("engine.engine.time", clock)
    monkeypatch.setattr(engine.runner, "run", clock.run)
    monkeypatch.setattr(engine.runner, "encode", clock.encode)
    results: dict[int, Result] = {}
    took: list[float] = []
    collect(results, engine.add(stream))
    for _ in range(2):
        collect(results, engine.step())
    for number, add in enumerate(others, 1):
        add.request_id = number
        collect(results, engine.add(add))
    for _ in range(2000):
        if not engine.has_work:
            return results, took
        began = clock.now
        collect(results, engine.step())
        if results[0].finish is None:
            took.append(clock.now - began)
    raise AssertionError("the engine did not finish")


def test_a_stream_does_not_wait_for_long_prompts(monkeypatch: pytest.MonkeyPatch, path: Path, oracle: Oracle) -> None:
    engine = load_engine(path, max_step_seconds=BOUND)
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    prompts = [text(40, 0), text(300, 7), text(250, 60)]
    results, took = steps(
        monkeypatch, engine, prompts[0].add(oracle.preprocessor, params),
        [prompt.add(oracle.preprocessor, SamplingParams(temperature=0.0, max_tokens=4)) for prompt in prompts[1:]],
    )  # fmt: skip
    assert max(took) <= BOUND + 1e-6
    assert sum(seconds > BOUND / 2 for seconds in took) >= 5  # and the time is used
    assert results[0].token_ids == oracle.generate(prompts[0], 100, ignore_eos=True)
    for number, prompt in enumerate(prompts[1:], 1):
        assert results[number].token_ids == oracle.generate(prompt, 4)


@pytest.mark.parametrize("cache", [None, 0])
def test_a_stream_does_not_wait_for_many_images(
    monkeypatch: pytest.MonkeyPatch, path: Path, oracle: Oracle, cache: int | None
) -> None:
    """cache: bytes for what the encoder gives; with none of it, an image that waits for a step is not lost."""
    engine = load_engine(path, max_step_seconds=BOUND, encoder_cache_bytes=cache)
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    stream = Prompt([random_image(100), *range(1, 20)])
    prompts = [Prompt([random_image(2 * number), 1, random_image(2 * number + 1), 2]) for number in range(6)]
    results, took = steps(
        monkeypatch, engine, stream.add(oracle.preprocessor, params),
        [prompt.add(oracle.preprocessor, SamplingParams(temperature=0.0, max_tokens=4)) for prompt in prompts],
    )  # fmt: skip
    assert max(took) <= 1.5 * BOUND  # images for half of it, then prompts
    assert results[0].token_ids == oracle.generate(stream, 100, ignore_eos=True)
    for number, prompt in enumerate(prompts, 1):
        assert results[number].token_ids == oracle.generate(prompt, 4)


def test_nothing_is_bounded_while_no_request_streams(
    monkeypatch: pytest.MonkeyPatch, path: Path, oracle: Oracle
) -> None:
    engine = load_engine(path, max_step_seconds=BOUND)
    prompts = [text(300, 7), text(150, 60)]
    params = SamplingParams(temperature=0.0, max_tokens=1)
    first, second = (prompt.add(oracle.preprocessor, params) for prompt in prompts)
    clock = Clock(engine)
    monkeypatch.setattr("engine.engine.time", clock)
    monkeypatch.setattr(engine.runner, "run", clock.run)
    second.request_id = 1
    engine.add(first)
    engine.add(second)
    engine.step()
    assert not engine.has_work
    assert clock.now == pytest.approx(DECODE + 450 * TOKEN)


def test_a_model_whose_decodes_alone_take_long_still_computes_prompts() -> None:
    time = StepTime(0.1)
    time.note_step(100, 1.0)
    time.note_step(0, 0.5)
    assert time.prompt_tokens() == 75  # one and a half times as long as the decodes take
    for _ in range(50):
        time.note_step(20, 20.0)
    assert time.prompt_tokens() == FEWEST_TOKENS


def test_without_a_bound_there_is_none() -> None:
    time = StepTime(None)
    time.note_step(100, 1.0)
    time.note_images(1, 10.0)
    assert time.prompt_tokens() is None
    assert time.images() is None
    assert not time.leaves_no_time(10.0)
