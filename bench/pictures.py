"""Seeded JPEGs that cost about as much to decode as photographs of their size."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

BACKGROUNDS = 8
SHAPES = 6


def jpegs(seed: int, count: int, width: int, height: int) -> Iterator[bytes]:
    """Yield ``count`` JPEGs of quality 90; no two have the same pixels, and a seed always gives the same."""
    random = np.random.default_rng([seed, width, height])
    for _ in range(count):
        picture = _background(int(random.integers(BACKGROUNDS)), width, height).copy()
        canvas = ImageDraw.Draw(picture)
        for _ in range(SHAPES):
            x, y = random.integers((width, height))
            dx, dy = random.integers((width // 3 + 2, height // 3 + 2)) + 1
            color = tuple(int(level) for level in random.integers(256, size=3))
            outline = canvas.ellipse if random.random() < 0.5 else canvas.rectangle
            outline((int(x), int(y), int(x + dx), int(y + dy)), fill=color)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
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
