"""Decode steps on static buffers, as CUDA graphs have them, on a CPU and without graphs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

import engine.loader
import engine.runner
from engine.decode_graphs import DecodeGraphs
from engine.engine import Engine
from engine.messages import Add
from engine.sampling_params import SamplingParams
from tests.support.engine_driver import Prompt, Result, collect, load_engine


def loaded(path: Path, *, static: bool, **settings: object) -> Engine:
    """An engine whose modules are those of a GPU, and its decode steps if `static`.

    On a CPU linear layers are stacked and packed, and decodes attend in compiled code, which torch does not see.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.loader, "stack", lambda _: None)
        patch.setattr(engine.loader, "pack", lambda _: None)
        patch.setattr(engine.runner, "has_graphs", lambda *_: static)
        made = load_engine(path, attention="torch", **settings)
    graphs = made.runner.graphs
    assert (graphs is not None) == static
    if graphs is not None:
        graphs.replays = {rows: partial(graphs.compute_rows, rows) for rows in graphs.sizes}
    return made


def watch(graphs: DecodeGraphs) -> list[int]:
    """Note the number of rows of each step that is run by one of the graphs from now on."""
    noted: list[int] = []

    def run(rows: int) -> None:
        noted.append(rows)
        replays[rows]()

    replays, graphs.replays = graphs.replays, {rows: partial(run, rows) for rows in graphs.replays}
    return noted


def adds(preprocessor: object, images: Sequence[Image.Image], seed: int, count: int = 14) -> list[Add]:
    """Requests of random lengths; half of them have an image, where there are any, and some share a beginning."""
    rng = random.Random(seed)
    shared = [rng.randrange(256) for _ in range(30)]
    made = []
    for number in range(count):
        items: list[int | Image.Image] = list(shared) if rng.random() < 0.4 else []
        items += [rng.randrange(256) for _ in range(rng.randint(1, 50))]
        if images and number % 2:
            items.insert(rng.randint(0, len(items)), rng.choice(images))
        params = SamplingParams(temperature=0.0, max_tokens=rng.randint(20, 44), ignore_eos=True)
        made.append(Prompt(items).add(preprocessor, params))  # type: ignore[arg-type]
    return made


def run(made: Engine, requests: list[Add], seed: int, within: int = 12) -> dict[int, list[int]]:
    """The tokens of requests that come within so many steps; two are aborted half-way."""
    rng = random.Random(seed)
    arrivals = sorted((rng.randint(0, within), number) for number in range(len(requests)))
    aborted = rng.sample(range(len(requests)), 2)
    results: dict[int, Result] = {}
    for step in range(2000):
        while arrivals and arrivals[0][0] <= step:
            _, number = arrivals.pop(0)
            requests[number].request_id = number
            assert made.add(requests[number]) == []
        collect(results, made.step())
        for number in aborted:
            if number in results and len(results[number].token_ids) == 3:
                made.abort(number)
        if not arrivals and not made.has_work:
            assert made.pool.num_used == 0
            assert not any(output.error for result in results.values() for output in result.outputs)
            return {number: result.token_ids for number, result in results.items()}
    raise AssertionError("the engine did not finish")
