"""A reproducible load of streamed chat requests with images, and its results."""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import functools
import gc
import io
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import uvloop
from PIL import Image, ImageDraw
from tqdm import tqdm

from bench.client import Connections, Reply

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
    tokens: int = 64  # asked for in every reply, which never stops earlier
    warmup: int = 32  # requests before the clock starts
    seed: int = 0

    def __str__(self) -> str:
        arrival = f"{self.streams} streams" if self.rate is None else f"{self.rate:g} requests/s"
        kind = "shared" if self.shared else "unique"
        shown = f"{self.images} {kind} {self.width}x{self.height}" if self.images else "no"
        return f"{arrival}, {shown} images, {self.tokens} tokens"


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
        _body(load, model, urls if load.shared else urls[i * shown : (i + 1) * shown], chance)
        for i in range(count)
    ]


def requests(load: Load, host: str, model: str, path: str = "/v1/chat/completions") -> list[bytes]:
    """Return whole HTTP requests, the warm-up's first, so that sending one is a single write."""
    return [http_request(host, path, body) for body in bodies(load, model)]


def http_request(host: str, path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def run(load: Load, host: str, port: int, made: list[bytes], label: str = "") -> Run:
    """Send the warm-up, then the load, and return what came back."""
    return uvloop.run(_run(load, host, port, made, label))


async def _run(load: Load, host: str, port: int, made: list[bytes], label: str) -> Run:
    connections = Connections(host, port)
    warmup, measured = made[: load.warmup], made[load.warmup :]
    try:
        await _closed(connections, warmup, min(load.streams, len(warmup)), None)
        gc.collect()
        gc.freeze()
        gc.disable()
        with tqdm(total=len(measured), desc=label or str(load), unit="req", mininterval=0.5) as bar:
            begin, cpu = time.perf_counter(), time.process_time()
            if load.rate is None:
                replies = await _closed(connections, measured, load.streams, bar)
            else:
                replies = await _open(connections, measured, load.rate, load.seed, bar)
            end, cpu = time.perf_counter(), time.process_time() - cpu
    finally:
        gc.enable()
        gc.unfreeze()
        connections.close()
    return Run(load, replies, begin, end, cpu)


async def _closed(
    connections: Connections, made: list[bytes], streams: int, bar: tqdm[None] | None
) -> list[Reply]:
    pending: Iterator[bytes] = iter(made)
    replies: list[Reply] = []

    async def stream() -> None:
        for request in pending:
            replies.append(await connections.send(request))
            if bar is not None:
                bar.update()

    await asyncio.gather(*(stream() for _ in range(streams)))
    return replies


async def _open(
    connections: Connections, made: list[bytes], rate: float, seed: int, bar: tqdm[None]
) -> list[Reply]:
    chance = random.Random(seed)

    async def one(request: bytes, due: float) -> Reply:
        reply = await connections.send(request, due)
        bar.update()
        return reply

    due = time.perf_counter()
    tasks = []
    for request in made:
        due += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(request, due)))
    return await asyncio.gather(*tasks)


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
    made = tqdm(jpegs(seed, count, width, height), "images", count, leave=False, mininterval=0.5)
    return tuple("data:image/jpeg;base64," + base64.b64encode(jpeg).decode() for jpeg in made)


def _body(load: Load, model: str, images: tuple[str, ...], chance: random.Random) -> bytes:
    text = " ".join(chance.choices(WORDS.split(), k=load.words))
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return msgspec.json.encode(
        {
            "model": model,
            "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
            "max_tokens": load.tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )


def add_arguments(parser: argparse.ArgumentParser, streams: str) -> None:
    """Add the options that describe loads, with the default numbers of streams."""
    load = Load()
    group = parser.add_argument_group("load", "several --streams or --rate, separated by commas, run in turn")
    group.add_argument("--streams", default=streams, metavar="N,..", help="requests at once (%(default)s)")
    group.add_argument(
        "--rate", metavar="N,..", help="requests per second at random times, in place of --streams"
    )
    group.add_argument(
        "--requests", type=int, help="measured (8 for each stream, or 10 s of --rate; at least 32)"
    )
    group.add_argument(
        "--images", "--pictures", type=int, default=load.images, help="per request (%(default)s)"
    )
    group.add_argument(
        "--size", type=_size, default=(load.width, load.height), metavar="WxH", help="(336x336)"
    )
    group.add_argument("--shared", action="store_true", help="the same images in every request")
    group.add_argument("--words", type=int, default=load.words, help="of text in a request (%(default)s)")
    group.add_argument("--tokens", type=int, default=load.tokens, help="in every reply (%(default)s)")
    group.add_argument("--warmup", type=int, default=load.warmup, help="requests not measured (%(default)s)")
    group.add_argument("--seed", type=int, default=load.seed, help="(%(default)s)")


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
        warmup=arguments.warmup,
    )
    if arguments.rate is not None:
        rates = [float(rate) for rate in arguments.rate.split(",")]
        loads = [dataclasses.replace(base, rate=rate, requests=max(32, round(10 * rate))) for rate in rates]
    else:
        counts = [int(count) for count in arguments.streams.split(",")]
        loads = [dataclasses.replace(base, streams=count, requests=max(32, 8 * count)) for count in counts]
    return [
        dataclasses.replace(load, requests=arguments.requests or load.requests, seed=arguments.seed + place)
        for place, load in enumerate(loads)
    ]


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height or width)
