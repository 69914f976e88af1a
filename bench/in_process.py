"""Answers the requests of a load in one process, without a server: with OpenVINO GenAI, or with our engine.

    PYTHON -P bench/in_process.py openvino|ours FOLDER [KEY=VALUE ...]

`bench.openvino` starts it. Each line of its input is an `Asked` as JSON; each line of its output the `Answered` to
it, after a first line with a `Loaded`. It ends with its input.

It imports nothing of `bench`, since OpenVINO has an environment of its own; -P, because of `bench/openvino.py`.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TextIO, TypedDict

import numpy as np
from PIL import Image

CACHE_GB = 1


class Loaded(TypedDict):
    computes_in: str


class Asked(TypedDict):
    """Bodies of OpenAI's chat requests, with one message each; ``warmup`` of them come before the clock starts."""

    bodies: list[str]
    streams: int
    warmup: int


class Timed(TypedDict):
    """A request; times are seconds on ``time.perf_counter``'s clock, which all processes of a machine share."""

    start: float
    tokens: list[float]
    prompt_tokens: int


class Answered(TypedDict):
    begin: float
    end: float
    cpu: float  # seconds of processor time
    memory: int  # resident, in bytes
    replies: list[Timed]


class Request:
    def __init__(self, body: str) -> None:
        """Read the body of a chat request with one message."""
        read = json.loads(body)
        (message,) = read["messages"]
        self.messages = [message]
        self.tokens: int = read["max_tokens"]
        self.text = "".join(part["text"] for part in message["content"] if part["type"] == "text")
        self.jpegs = [
            base64.b64decode(part["image_url"]["url"].partition(",")[2])
            for part in message["content"]
            if part["type"] == "image_url"
        ]

    def images(self) -> list[Image.Image]:
        return [Image.open(io.BytesIO(jpeg)).convert("RGB") for jpeg in self.jpegs]


class Pipeline(Protocol):
    """A rolling batch. Answers are greedy and have as many tokens as were asked for."""

    computes_in: str

    def add(self, number: int, request: Request) -> None: ...

    def step(self) -> Iterable[tuple[int, int]]:
        """Run a step, and return how many new tokens each request has, after its number."""

    def end(self, number: int) -> int:
        """Forget a request that has all its tokens, and return how many its prompt had."""


class OpenVINO:
    """Its continuous batching, with a key/value cache of 1 GiB and otherwise at its defaults."""

    def __init__(self, folder: Path, options: Sequence[str]) -> None:
        self._genai: Any = import_module("openvino_genai")
        self._tensor: Any = import_module("openvino").Tensor
        scheduler = self._genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        properties: dict[str, Any] = dict(option.split("=", 1) for option in options)
        self._pipeline = self._genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)
        self._active: dict[int, Any] = {}
        self.computes_in = _openvino_precision(folder, properties)

    def add(self, number: int, request: Request) -> None:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = request.tokens
        config.ignore_eos = True
        config.do_sample = False
        images = [self._tensor(np.asarray(image)[None]) for image in request.images()]
        self._active[number] = self._pipeline.add_request(number, request.text, images, config)

    def step(self) -> Iterator[tuple[int, int]]:
        if not self._pipeline.has_non_finished_requests():
            raise RuntimeError(f"OpenVINO ended {len(self._active)} requests too early")
        self._pipeline.step()
        for number, handle in self._active.items():
            while handle.can_read():
                yield number, sum(len(output.generated_ids) for output in handle.read().values())

    def end(self, number: int) -> int:
        return int(self._active.pop(number).get_vlm_perf_metrics().get_num_input_tokens())


def _openvino_precision(folder: Path, properties: dict[str, Any]) -> str:
    core = import_module("openvino").Core()
    model = core.compile_model(str(folder / "openvino_language_model.xml"), "CPU", properties)
    activations, cache = (
        model.get_property(name).get_type_name() for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
    )
    return f"{activations}, key/value cache {cache}"


class Ours:
    """The embedded engine as the server configures it, with the same options."""

    def __init__(self, folder: Path, options: Sequence[str]) -> None:
        from engine.machine import keep_freed_memory
        from engine.process import limit_spinning, use_cores

        limit_spinning()
        import torch

        from engine.engine import Engine
        from engine.executor import threads_for
        from engine.loader import load_preprocessor
        from handlers.backends.rolling.plan import plan_engines
        from handlers.offline.options import configure
        from handlers.prompts.tokenizer import load_tokenizer

        settings = configure(str(folder), dict(option.split("=", 1) for option in options)).settings
        config = plan_engines(settings, str(folder), 0)[0]  # the only one: scripts have one replica
        torch.set_num_threads(threads_for(config))
        self._engine = Engine.load(config)
        keep_freed_memory()
        use_cores(self._engine.runner, config)
        self._engine.warm_up()
        preprocessor = load_preprocessor(str(folder))
        assert preprocessor is not None
        self._preprocessor = preprocessor
        self._tokenizer = load_tokenizer(str(folder), trust_remote_code=False)
        self._prompt_tokens: dict[int, int] = {}
        dtype = str(self._engine.runner.dtype).removeprefix("torch.")
        self.computes_in = f"{dtype}, decoder in 8 bits" if config.int8 else dtype

    def add(self, number: int, request: Request) -> None:
        from engine.messages import Add, ImageInput, TensorData
        from engine.sampling_params import SamplingParams

        ids = self._tokenizer.apply_chat_template(
            request.messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        prompt: list[int] = []
        placed = []
        images = iter(request.images())
        for token in ids:
            if token != self._preprocessor.image_token_id:
                prompt.append(token)
                continue
            prepared = self._preprocessor.prepare(next(images))
            tensors = {name: TensorData.pack(array) for name, array in prepared.tensors.items()}
            digest = b"%d %d" % (number, len(placed))
            placed.append(ImageInput(digest, len(prompt), len(prepared.token_ids), tensors, prepared.is_embed))
            prompt += prepared.token_ids
        params = SamplingParams(temperature=0.0, max_tokens=request.tokens, ignore_eos=True)
        refused = self._engine.add(Add(number, prompt, params, [0], (), placed))
        if refused:
            raise RuntimeError(refused[0].error)
        self._prompt_tokens[number] = len(prompt)

    def step(self) -> Iterator[tuple[int, int]]:
        for output in self._engine.step():
            if output.error is not None:
                raise RuntimeError(output.error)
            yield output.request_id, len(output.token_ids)

    def end(self, number: int) -> int:
        return self._prompt_tokens.pop(number)


PIPELINES = {"openvino": OpenVINO, "ours": Ours}


def answer(pipeline: Pipeline, numbers: Iterator[int], asked: Asked) -> Answered:
    """Send the warm-up, then the measured requests, each of the streams one after the other."""
    requests = [Request(body) for body in asked["bodies"]]
    _closed(pipeline, numbers, requests[: asked["warmup"]], asked["streams"])
    begin, cpu = time.perf_counter(), time.process_time()
    replies = _closed(pipeline, numbers, requests[asked["warmup"] :], asked["streams"])
    end, cpu = time.perf_counter(), time.process_time() - cpu
    return Answered(begin=begin, end=end, cpu=cpu, memory=_resident(), replies=replies)


def _closed(pipeline: Pipeline, numbers: Iterator[int], requests: Sequence[Request], streams: int) -> list[Timed]:
    replies: list[Timed] = []
    active: dict[int, tuple[Timed, int]] = {}
    waiting = iter(requests)
    free = [time.perf_counter()] * min(streams, len(requests))
    while True:
        for start, request in zip(free, waiting, strict=False):
            number = next(numbers)
            pipeline.add(number, request)
            reply = Timed(start=start, tokens=[], prompt_tokens=0)
            replies.append(reply)
            active[number] = reply, request.tokens
        if not active:
            return replies
        produced = [*pipeline.step()]
        now = time.perf_counter()
        free = []
        for number, count in produced:
            reply, wanted = active[number]
            reply["tokens"] += [now] * count
            if len(reply["tokens"]) >= wanted:
                del active[number]
                reply["prompt_tokens"] = pipeline.end(number)
                free.append(now)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _own_output() -> TextIO:
    """Return standard output, to which from now on nobody else writes: libraries write to standard error."""
    own = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return own


def main() -> None:
    output = _own_output()
    kind, folder, *options = sys.argv[1:]
    pipeline: Pipeline = PIPELINES[kind](Path(folder), options)
    print(json.dumps(Loaded(computes_in=pipeline.computes_in)), file=output)
    numbers = itertools.count()
    for line in sys.stdin:
        print(json.dumps(answer(pipeline, numbers, json.loads(line))), file=output)


if __name__ == "__main__":
    main()
