"""The comparison with OpenVINO GenAI, without OpenVINO: the load in process, our engine under it, and the tables."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from bench import in_process, load, models, openvino
from bench.in_process import Answered, Asked, Request, Timed

SMALL = load.Load(requests=5, streams=2, width=32, height=24, words=4, tokens=3, warmup=1)


class Fake:
    """Gives each request one token a step, and remembers how many there were at a time."""

    computes_in = "nothing"

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.at_once: list[int] = []
        self.texts: list[str] = []

    def add(self, number: int, request: Request) -> None:
        self.left[number] = request.tokens
        self.texts.append(request.text)
        assert [image.size for image in request.images()] == [(32, 24)]

    def end(self, number: int) -> int:
        assert number not in self.left
        return 7

    def step(self) -> Iterable[tuple[int, int]]:
        self.at_once.append(len(self.left))
        for number in self.left:
            self.left[number] -= 1
        produced = [(number, 1) for number in self.left]
        self.left = {number: left for number, left in self.left.items() if left}
        return produced


def asked() -> Asked:
    bodies = [body.decode() for body in load.bodies(SMALL, "")]
    return Asked(bodies=bodies, streams=SMALL.streams, warmup=SMALL.warmup)


def test_a_stream_sends_its_next_request_when_the_last_has_ended() -> None:
    pipeline = Fake()
    answered = in_process.answer(pipeline, itertools.count(), asked())
    assert pipeline.at_once == [1, 1, 1, *[2] * 6, 1, 1, 1]
    assert len(set(pipeline.texts)) == 6
    replies = answered["replies"]
    assert [(len(reply["tokens"]), reply["prompt_tokens"]) for reply in replies] == [(3, 7)] * 5
    assert replies[2]["start"] == replies[0]["tokens"][-1]
    assert answered["begin"] < replies[0]["tokens"][0] < replies[-1]["tokens"][-1] < answered["end"]


def test_the_summary_is_that_of_a_served_load() -> None:
    replies = [
        Timed(start=0.0, tokens=[1.0, 1.5, 2.0], prompt_tokens=9),
        Timed(start=0.0, tokens=[2.0, 2.5, 3.0], prompt_tokens=9),
    ]
    answered = Answered(begin=0.0, end=3.0, cpu=4.5, memory=5_000_000, replies=replies)
    row = openvino.summary(SMALL, answered, "bf16")
    assert row["tokens_per_s"] == pytest.approx(2)
    assert row["tpot_ms"]["p50"] == pytest.approx(500)
    assert row["ttft_ms"]["p50"] == pytest.approx(1500)
    assert (row["cpu_cores"], row["memory_mb"], row["computes_in"]) == (1.5, 5, "bf16")
    assert row["outcomes"] == {"200": 2}


def test_our_engine_answers_in_process_and_ends_with_its_input(tmp_path: Path) -> None:
    folder, log = models.write(tmp_path / "model"), tmp_path / "log"
    command = [sys.executable, "-P", str(openvino.SCRIPT), "ours", str(folder), "kv_cache_memory_mb=64"]
    with openvino.worker(command, log) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        loaded = json.loads(process.stdout.readline() or "{}")
        assert loaded, log.read_text()
        process.stdin.write(json.dumps(asked()) + "\n")
        process.stdin.flush()
        row = openvino.summary(SMALL, json.loads(process.stdout.readline()), loaded["computes_in"])
    assert process.returncode == 0
    assert row["requests"] == 5
    assert row["prompt_tokens"] > models.SIZES["1.5m"].image_tokens
    assert row["computes_in"] in ("bfloat16", "float32")


def numbers(tokens_per_s: float) -> dict[str, Any]:
    latencies = {key: dict.fromkeys(("p50", "p90", "p99"), 1000 / tokens_per_s) for key in
                 ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms")}  # fmt: skip
    rates = {"requests_per_s": tokens_per_s / 64, "tokens_per_s": tokens_per_s, "prompt_tokens": 80.0}
    return {**latencies, **rates, "cpu_cores": 1.5, "memory_mb": 900.0, "computes_in": "bf16"}


def test_the_table_has_the_ratio_of_each_of_our_sides_to_its_peer() -> None:
    rounds = [{"ours": numbers(150), "openvino": numbers(100), "ours-int8": numbers(500)}]
    ratios = {"16 streams": openvino.times_better(rounds)}
    assert ratios["16 streams"].keys() == {"ours"}  # the peer of ours-int8 was not measured
    lines = openvino.markdown({"16 streams": rounds[0]}, ratios).splitlines()
    assert lines[0] == "## 16 streams"
    assert lines[4].startswith("| our server, over HTTP | 150 | 1.50 | 6.7 | 1.50 | 7 / 7 | 1.50 |")
    assert lines[5].startswith("| OpenVINO GenAI, in process | 100 |  | 10.0 |  | 10 / 10 |  |")
    assert lines[5].endswith("| 1.50 | 67 | 900 |")
    assert lines[-1] == "- our server, quantize=int8: bf16; 80 prompt tokens"


def test_an_unknown_side_is_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="vllm: expected some of ours,"):
        openvino._sides("ours,vllm")


def test_without_its_environment_it_says_where_to_read(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"docs/performance\.md"):
        openvino.convert(tmp_path / "python", tmp_path, tmp_path, "fp16", tmp_path / "log")
