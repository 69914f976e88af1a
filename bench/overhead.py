"""The cost of the protocols: processor time to read a body, to write a reply, and to write one token.

    python -m bench.overhead

Without a model or a socket, each protocol reads the same request with an image of 100 KB, and writes the same
answer of 200 tokens, whole and streamed. Exits with 1 if a protocol exceeds its bounds: 1 ms per request, 20
us per token.
"""

from __future__ import annotations

import argparse
import base64
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from bench.load import jpegs
from handlers.deltas import Delta, PositionLogprobs, PromptStats, TokenLogprob
from handlers.protocols.base import Answer, Answered, ServerContext, Task
from handlers.protocols.body import read_body
from handlers.request import Incoming
from handlers.service import read_task

TOKENS = 200
WORDS = (" The", " small", " round", " shape", " is", " ré", "d", ",", "\n", ' "so')
REQUEST_MS, TOKEN_US = 1.0, 20.0
_TEXT = "What is in this image? " * 8


@dataclass(frozen=True)
class Case:
    """A route and a body for it. logprobs: whether its tokens come with log probabilities and two alternatives."""

    route: str
    body: dict[str, Any]
    logprobs: bool = False


@dataclass(frozen=True)
class Cost:
    """Medians of processor time: of a request (reading it, and its first and last chunk), and of one more token."""

    request_ms: float
    token_us: float


def cases(image: str) -> dict[str, Case]:
    parts = [{"type": "text", "text": _TEXT}, {"type": "image_url", "image_url": {"url": image}}]
    chat = {"model": "m", "messages": [{"role": "user", "content": parts}], "max_tokens": TOKENS, "seed": 7}
    prompt = f"![]({image}){_TEXT}"
    parameters = {"max_new_tokens": TOKENS, "seed": 7, "temperature": 0.7, "top_p": 0.9}
    return {
        "chat": Case("/v1/chat/completions", chat),
        "chat, logprobs": Case("/v1/chat/completions", {**chat, "logprobs": True, "top_logprobs": 2}, logprobs=True),
        "completions": Case("/v1/completions", {"model": "m", "prompt": prompt, "max_tokens": TOKENS}),
        "LMI": Case("/invocations", {"inputs": prompt, "parameters": parameters}),
        "LMI, chat": Case("/invocations", chat),
        "TGI": Case("/generate", {"inputs": prompt, "parameters": {**parameters, "details": True}}),
    }


def cost(case: Case, repeats: int = 60) -> Cost:
    """Measure one protocol, streamed; a whole reply is like a single chunk."""
    deltas = _deltas(logprobs=case.logprobs)
    stats = PromptStats(prompt_tokens=640, image_tokens=576, prompt_token_ids=[5] * 640, prompt_text=_TEXT)
    context = ServerContext("m")
    whole, streamed = (msgspec.json.encode({**case.body, "stream": stream}) for stream in (False, True))
    if case.route == "/generate":
        whole = streamed = msgspec.json.encode(case.body)

    def task(body: bytes, route: str) -> Task:
        headers = {"content-type": "application/json"}
        return read_task(read_body(body, headers), context, Incoming(route, body, headers, "id"))

    def answer() -> None:
        writer = task(whole, case.route).writer
        one = Answer()
        for delta in deltas:
            one.add(delta)
        writer.whole([Answered(stats, [one])])

    stream_route = "/generate_stream" if case.route == "/generate" else case.route
    writers = [task(streamed, stream_route).writer for _ in range(repeats)]

    def stream() -> None:
        writer = writers.pop()
        for delta in deltas:
            writer.chunk(delta, stats)
        writer.end(stats)

    return Cost(_median(answer, repeats) * 1e3, _median(stream, repeats) * 1e6 / TOKENS)


def _deltas(*, logprobs: bool) -> list[Delta]:
    made = []
    for number in range(TOKENS):
        text = WORDS[number % len(WORDS)]
        one = TokenLogprob(number, text, -0.5, 1)
        position = PositionLogprobs(one, (one, TokenLogprob(number + 1, " other", -1.5, 2)))
        made.append(Delta(0, [number], text, [position]))
        if not logprobs:
            # TGI's and LMI's streams show every token's probability, so theirs are there in any case.
            made[-1].logprobs = [PositionLogprobs(one, ())]
    made[-1].finish_reason = "length"
    return made


def _median(work: Callable[[], None], repeats: int) -> float:
    """Seconds of this thread's processor time."""
    times = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            start = time.thread_time()
            work()
            times.append(time.thread_time() - start)
    finally:
        gc.enable()
    return statistics.median(times)


def table(costs: dict[str, Cost]) -> str:
    rows = ["| API | CPU a request, ms | CPU a streamed token, us |", "|---|---|---|"]
    rows += [f"| {name} | {one.request_ms:.2f} | {one.token_us:.1f} |" for name, one in costs.items()]
    return "\n".join(rows)


def measured() -> dict[str, Cost]:
    """Measure every protocol. A request's time includes a whole reply of 200 tokens."""
    (file,) = jpegs(seed=0, count=1, width=680, height=680)
    image = "data:image/jpeg;base64," + base64.b64encode(file).decode()
    return {name: cost(case) for name, case in cases(image).items()}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m bench.overhead",
    ).parse_args()
    costs = measured()
    print(table(costs))
    slow = [name for name, one in costs.items() if one.request_ms > REQUEST_MS or one.token_us > TOKEN_US]
    if slow:
        raise SystemExit(f"above {REQUEST_MS:g} ms a request or {TOKEN_US:g} us a token: {', '.join(slow)}")


if __name__ == "__main__":
    main()
