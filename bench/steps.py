"""Steps of the embedded engine in one process, without a server.

    python -m bench.steps --random 212m --threads 1

Prints the time of a decode step for several numbers of requests, beside the time in which the machine reads the
decoder's weights once, which is the least that a step can take; and the time of a prompt's first token, beside that
of transformers' own forward pass, taken in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForImageTextToText

from bench.run import add_model_arguments, model_folder
from engine.config import EngineConfig
from engine.engine import Engine
from engine.machine import keep_freed_memory
from engine.messages import Add
from engine.packed_linear import PackedLinear
from engine.sampling_params import SamplingParams

PROMPT, STEPS = 128, 48


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m bench.steps",
    )
    add_model_arguments(parser)
    parser.add_argument("--dtype", default="auto", help="(%(default)s)")
    parser.add_argument("--int8", action="store_true", help="with option.quantize=int8")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--rows", default="1,4,16", help="requests at once (%(default)s)")
    parser.add_argument("--prompt", type=int, default=2000, help="tokens; 0: no prompt (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = str(model_folder(arguments))
    config = EngineConfig(
        model_path=folder,
        dtype=arguments.dtype,
        int8=arguments.int8,
        kv_cache_bytes=1 << 30,
        enable_prefix_caching=False,
    )
    engine = Engine.load(config)
    keep_freed_memory()
    engine.warm_up()
    limit = _reading(_weights(engine))
    print(f"{engine.runner.dtype}, {arguments.threads} threads; reading the decoder's weights: {limit:.1f} ms")
    for rows in map(int, arguments.rows.split(",")):
        times = [time for _ in range(arguments.rounds) for time in _steps(engine, rows, PROMPT, STEPS)[-STEPS + 2 :]]
        median = statistics.median(times)
        print(f"{rows:3} requests: {median:6.1f} ms a step, {median / limit:.2f} times the reading", flush=True)
    if arguments.prompt:
        _compare_prompt(engine, folder, arguments.prompt, arguments.rounds)


def _steps(engine: Engine, requests: int, length: int, tokens: int) -> list[float]:
    """Run requests to their ends, and return the milliseconds of each step."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    for number in range(requests):
        engine.add(Add(number, _prompt(engine, number, length), params, [0], ()))
    times = []
    while engine.has_work:
        times.append(_timed(engine.step))
    return times


def _prompt(engine: Engine, seed: int, length: int) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(300, engine.runner.vocab_size, (length,), generator=random).tolist()
    return ids


def _compare_prompt(engine: Engine, folder: str, length: int, rounds: int) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=engine.runner.dtype).eval()
    ids = torch.tensor([_prompt(engine, 0, length)])
    ours, theirs = [], []
    with torch.inference_mode():
        for _ in range(rounds):
            ours.append(sum(_steps(engine, 1, length, 1)))
            theirs.append(_timed(lambda: model(ids, logits_to_keep=1)))
    ratio = statistics.median(other / own for own, other in zip(ours, theirs, strict=True))
    mine, other = (length / statistics.median(times) * 1000 for times in (ours, theirs))
    print(f"prompt of {length} tokens: {mine:.0f} tokens/s, transformers {other:.0f}: {ratio:.2f} times")


def _weights(engine: Engine) -> int:
    modules = [*engine.runner.model.decoder.modules(), engine.runner.model.head]
    return sum(module.weight_bytes for module in modules if isinstance(module, PackedLinear))


def _reading(size: int) -> float:
    """Milliseconds in which this process reads so many bytes."""
    data = torch.ones(size // 8, dtype=torch.int64)
    return min(_timed(data.sum) for _ in range(10))


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
