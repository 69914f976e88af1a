"""The cost of decoding: images per second and core, in the pool of decoder processes and in one process.

    python -m bench.decoders

Processor time of all processes together counts, so that other work on the machine matters little; the last
column is the front end's part of it. The last 64 images are kept, as a server keeps some. Exits with 1 if the
pool decodes fewer than 40 images of 336x336 per second and core.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import deque
from collections.abc import Sequence

import psutil
from PIL import Image

from bench.load import jpegs
from bench.report import machine
from handlers.images.decoder import decode, prepare_pillow
from handlers.images.decoder_pool import DecoderPool
from handlers.images.formats import read_header
from handlers.images.limits import ImageLimits

MAX_PIXELS = 89_478_485
LEAST = 40.0
SIDES = (336, 1024)
REPEATS = 3


Kept = deque[Image.Image]


def plain(files: Sequence[bytes], kept: Kept) -> float:
    """Return images per second of processor time in one process."""
    begin = time.process_time()
    for file in files:
        kept.append(decode(file, MAX_PIXELS))
    return len(files) / (time.process_time() - begin)


async def pooled(pool: DecoderPool, files: Sequence[bytes], kept: Kept) -> tuple[float, float]:
    """Return images per second of processor time of all processes, and milliseconds of the front end per image."""
    before, front = _processor_time(), time.process_time()
    for start in range(0, len(files), 16):
        await asyncio.gather(*(_decoded(pool, file, kept) for file in files[start : start + 16]))
    front = time.process_time() - front
    return len(files) / (_processor_time() - before), front / len(files) * 1000


async def _decoded(pool: DecoderPool, file: bytes, kept: Kept) -> None:
    header = read_header(file)
    assert header is not None
    kept.append(await pool.decode(file, header))


def _processor_time() -> float:
    """Seconds, in steps of a hundredth for each decoder."""
    times = [child.cpu_times() for child in psutil.Process().children()]
    return time.process_time() + sum(one.user + one.system for one in times)


async def measured(count: int) -> dict[int, tuple[float, float, float]]:
    """Return medians by side length: plain, pooled, and the front end's milliseconds per image."""
    prepare_pillow(MAX_PIXELS)
    pool = DecoderPool(ImageLimits(max_pixels=MAX_PIXELS, memory_bytes=1 << 30))
    kept: Kept = deque(maxlen=64)
    rows = {}
    for side in SIDES:
        files = list(jpegs(seed=0, count=count, width=side, height=side))
        await pooled(pool, files, kept)
        alone = [plain(files, kept) for _ in range(REPEATS)]
        together, front = zip(*[await pooled(pool, files, kept) for _ in range(REPEATS)], strict=True)
        rows[side] = statistics.median(alone), statistics.median(together), statistics.median(front)
    for child in psutil.Process().children():
        memory = child.memory_full_info()
        print(f"decoder: {memory.rss / 2**20:.0f} MB resident, {memory.pss / 2**20:.0f} MB of them its share (PSS)")
    await pool.aclose()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m bench.decoders",
    )
    parser.add_argument("--count", type=int, default=256, help="images of each size (%(default)s)")
    rows = asyncio.run(measured(parser.parse_args().count))
    print(machine())
    print("| JPEG | within one process, images/s/core | decoder pool, images/s/core | front, ms/image |")
    print("|---|---|---|---|")
    for side, (alone, together, front) in rows.items():
        print(f"| {side}x{side} | {alone:.0f} | {together:.0f} | {front:.2f} |")
    if rows[SIDES[0]][1] < LEAST:
        raise SystemExit(f"fewer than {LEAST:g} images of {SIDES[0]} pixels a second and core")


if __name__ == "__main__":
    main()
