"""A reproducible load of streamed chat requests with images, and its results."""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import functools
import gc
import io
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import uvloop
from PIL import Image, ImageDraw

from bench.client import Connections, Reply
from bench.servers import INTERVAL, Server

WORDS = """
    a the one some red blue green small large old new round square light dark picture house tree river road
    bird dog boat hill cloud sun table glass stone field door window what where which how many is are stands
    lies moves near far left right above below between
"""


BACKGROUNDS = 8
SHAPES = 6


@dataclass(frozen=True)
class Load:
    """What to send.

    With ``rate`` set, requests arrive at random (Poisson), whatever the server does; otherwise each of
    ``streams`` clients sends its next request as soon as the last one has ended.
    """

    requests: int = 256
    streams: int = 32
    rate: float | None = None  # requests per second
    images: int = 1  # per request
    width: int = 336
    height: int = 336
    shared: bool = False  # every request shows the same images
    words: int = 16  # of text in a request
    tokens: int = 64  # asked for in every reply
    ignore_eos: bool = True  # a reply never stops earlier; a field that OpenAI itself refuses
    warmup: int = 32  # requests before the clock starts
    seconds: float | None = None  # after which no request is sent any more
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.arrival}, {self.content}"

    @property
    def arrival(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g} requests/s"
        return f"{self.streams} stream{'' if self.streams == 1 else 's'}"

    @property
    def content(self) -> str:
        kind = "shared" if self.shared else "unique"
        shown = f"{self.images} {kind} {self.width}x{self.height}" if self.images else "no"
        return f"{shown} images, {self.tokens} tokens"


LOADS = {
    "one-336": Load(),
    "two-1024": Load(requests=160, images=2, width=1024, height=1024),
}
"""The loads that are compared by default."""


@dataclass(frozen=True)
class Run:
    """One load's replies; ``begin`` and ``end`` are seconds on ``time.perf_counter``'s clock."""

    load: Load
    replies: list[Reply]
    begin: float
    end: float
    client_cpu: float  # seconds of processor time that the load generator itself took


def bodies(load: Load, model: str) -> list[bytes]:
    """Return the JSON bodies of the warm-up's requests, then of the measured ones."""
    count = load.warmup + load.requests
    chance = random.Random(load.seed)
    urls = _image_urls(load.seed, load.images * (1 if load.shared else count), load.width, load.height)
    shown = load.images
    return [
        _body(load, model, urls if load.shared else urls[i * shown : (i + 1) * shown], chance) for i in range(count)
    ]


def http_request(target: Server, body: bytes) -> bytes:
    """Return a whole HTTP request, so that sending it is a single write."""
    key = f"authorization: Bearer {target.key}\r\n" if target.key else ""
    head = (
        f"POST {target.path}/v1/chat/completions HTTP/1.1\r\nhost: {target.netloc}\r\n{key}"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


Watch = Callable[[Server, Load, list[Reply]], contextlib.AbstractContextManager[object]]
"""Entered while a load runs, with the list to which the measured replies are added when their requests are sent."""


def unwatched(target: Server, load: Load, replies: list[Reply]) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext()


def run(load: Load, target: Server, watch: Watch = unwatched) -> Run:
    """Send the warm-up, then the load, and return what came back.

    If the server was started here, the last sample of its processes is later than the last reply.
    """
    replies: list[Reply] = []
    with watch(target, load, replies):
        made = [http_request(target, body) for body in bodies(load, target.model)]
        result = uvloop.run(_run(load, target, made, replies))
    if target.samples:
        time.sleep(2 * INTERVAL)
    return result


async def _run(load: Load, target: Server, made: list[bytes], replies: list[Reply]) -> Run:
    connections = Connections(target.host, target.port, target.tls)
    warmup, measured = made[: load.warmup], made[load.warmup :]
    try:
        await _closed(connections, warmup, min(load.streams, len(warmup)), load.seconds, [])
        gc.collect()
        gc.freeze()
        gc.disable()
        begin, cpu = time.perf_counter(), time.process_time()
        if load.rate is None:
            await _closed(connections, measured, load.streams, load.seconds, replies)
        else:
            await _open(connections, measured, load.rate, load.seconds, load.seed, replies)
        end, cpu = time.perf_counter(), time.process_time() - cpu
    finally:
        gc.enable()
        gc.unfreeze()
        connections.close()
    if target.key:  # which a server may repeat in what it complains of
        for reply in replies:
            reply.error = reply.error.replace(target.key, "***")
    return Run(load, replies, begin, end, cpu)


async def _closed(
    connections: Connections, made: list[bytes], streams: int, seconds: float | None, replies: list[Reply]
) -> None:
    pending: Iterator[bytes] = iter(made)
    last = time.perf_counter() + (seconds or float("inf"))

    async def stream() -> None:
        for request in pending:
            reply = Reply(time.perf_counter())
            replies.append(reply)
            await connections.send(request, reply)
            if reply.end > last:
                return

    await asyncio.gather(*(stream() for _ in range(streams)))


async def _open(
    connections: Connections,
    made: list[bytes],
    rate: float,
    seconds: float | None,
    seed: int,
    replies: list[Reply],
) -> None:
    chance = random.Random(seed)
    due = time.perf_counter()
    last = due + (seconds or float("inf"))
    tasks = []
    for request in made:
        due += chance.expovariate(rate)
        if due > last:
            break
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        replies.append(Reply(due))
        tasks.append(asyncio.create_task(connections.send(request, replies[-1])))
    await asyncio.gather(*tasks)


def jpegs(seed: int, count: int, width: int, height: int) -> Iterator[bytes]:
    """Yield ``count`` JPEGs of quality 90 that cost about as much to decode as photographs of their size.

    No two have the same pixels, and a seed always gives the same images.
    """
    random = np.random.default_rng([seed, width, height])
    for _ in range(count):
        image = _background(int(random.integers(BACKGROUNDS)), width, height).copy()
        canvas = ImageDraw.Draw(image)
        for _ in range(SHAPES):
            x, y = random.integers((width, height))
            dx, dy = random.integers((width // 3 + 2, height // 3 + 2)) + 1
            color = tuple(int(level) for level in random.integers(256, size=3))
            outline = canvas.ellipse if random.random() < 0.5 else canvas.rectangle
            outline((int(x), int(y), int(x + dx), int(y + dy)), fill=color)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        yield file.getvalue()


@functools.lru_cache(maxsize=4 * BACKGROUNDS)
def _background(index: int, width: int, height: int) -> Image.Image:
    """A smooth scene with coarse and fine texture: about two bits a pixel at quality 90, as photographs have."""
    random = np.random.default_rng([index, width, height])
    levels = np.full((height, width, 3), 128.0)
    for cells, strength in ((4, 70.0), (24, 25.0), (128, 14.0)):
        noise = random.normal(0.0, strength, (cells, cells)).astype(np.float32)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        levels += np.asarray(layer)[..., None] * random.uniform(0.6, 1.0, 3)
    levels += random.normal(0.0, 4.0, (height, width, 1))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


@functools.lru_cache(maxsize=1)
def _image_urls(seed: int, count: int, width: int, height: int) -> tuple[str, ...]:
    made = jpegs(seed, count, width, height)
    return tuple("data:image/jpeg;base64," + base64.b64encode(jpeg).decode() for jpeg in made)


def _body(load: Load, model: str, images: tuple[str, ...], chance: random.Random) -> bytes:
    text = " ".join(chance.choices(WORDS.split(), k=load.words))
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return msgspec.json.encode(
        {
            "model": model,
            "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
            "max_tokens": load.tokens,
            **({"ignore_eos": True} if load.ignore_eos else {}),
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )


def add_arguments(
    parser: argparse.ArgumentParser, streams: str, warmup: int = Load.warmup, seconds: float | None = None
) -> None:
    """Add the options that describe loads, with these defaults."""
    load = Load()
    group = parser.add_argument_group("load", "several --streams or --rate, separated by commas, run in turn")
    add = group.add_argument
    add(
        "--streams",
        type=_list(_whole(1)),
        default=streams,
        metavar="N,..",
        help="requests at once (%(default)s)",
    )
    add(
        "--rate",
        type=_list(_positive),
        metavar="N,..",
        help="requests per second at random times, in place of --streams",
    )
    add("--requests", type=_whole(1), help="measured (8 for each stream, or 10 s of --rate; at least 32)")
    add("--images", "--pictures", type=_whole(0), default=load.images, help="per request (%(default)s)")
    add("--size", type=_size, default=(load.width, load.height), metavar="WxH", help="of images (336x336)")
    add("--shared", action="store_true", help="the same images in every request")
    add("--words", type=_whole(1), default=load.words, help="of text in a request (%(default)s)")
    add("--tokens", type=_whole(1), default=load.tokens, help="in every reply (%(default)s)")
    add(
        "--no-ignore-eos",
        dest="ignore_eos",
        action="store_false",
        help="replies end where the model ends them: for servers that refuse the field ignore_eos",
    )
    add("--warmup", type=_whole(0), default=warmup, help="requests not measured (%(default)s)")
    add(
        "--seconds",
        type=_positive,
        default=seconds,
        metavar="S",
        help=f"of each load, after which no request is sent any more ({seconds or 'no end'})",
    )
    add("--seed", type=int, default=load.seed, help="(%(default)s)")


def from_arguments(arguments: argparse.Namespace) -> list[Load]:
    """Return the loads that the options describe, no two with the same images unless they are shared."""
    width, height = arguments.size
    base = Load(
        images=arguments.images,
        width=width,
        height=height,
        shared=arguments.shared,
        words=arguments.words,
        tokens=arguments.tokens,
        ignore_eos=arguments.ignore_eos,
        warmup=arguments.warmup,
        seconds=arguments.seconds,
    )
    if arguments.rate is not None:
        loads = [dataclasses.replace(base, rate=rate, requests=max(32, round(10 * rate))) for rate in arguments.rate]
    else:
        loads = [dataclasses.replace(base, streams=count, requests=max(32, 8 * count)) for count in arguments.streams]
    return [
        dataclasses.replace(load, requests=arguments.requests or load.requests, seed=arguments.seed + place)
        for place, load in enumerate(loads)
    ]


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return read


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return _whole(1)(width), _whole(1)(height or width)
