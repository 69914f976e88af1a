"""The code that a Phi-3 Vision checkpoint brings along, of which vLLM runs the configuration and the processor.

This file is copied into the model's directory, so it imports nothing of the tests.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, Phi3Config, ProcessorMixin

TILE, MOST, LINES = 336, 4, 12
"""Edge of a tile in pixels, the most tiles of an image, and lines of rows in a tile."""


class Phi3VConfig(Phi3Config):  # type: ignore[no-untyped-call]
    model_type = "phi3_v"
    img_processor: Any = None
    embd_layer: Any = None


class Phi3VProcessor(ProcessorMixin):  # type: ignore[no-untyped-call]
    """An image becomes itself, shrunk to a tile, and its tiles."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.img_tokens = [f"<|image_{number}|>" for number in range(1, 100)]

    @classmethod
    def from_pretrained(cls, path: str, *_: Any, **__: Any) -> Phi3VProcessor:  # type: ignore[override]
        return cls(AutoTokenizer.from_pretrained(path))

    def calc_num_image_tokens_from_image_size(self, *, width: int, height: int) -> int:
        tiles, (down, _) = prepared(Image.new("RGB", (width, height)))
        return len(tiles) * LINES**2 + (down + 1) * LINES + 1

    def __call__(self, text: str = "", images: Any = (), **_: Any) -> BatchFeature:  # type: ignore[override]
        found: dict[str, Any] = {"input_ids": torch.tensor([self.tokenizer(text).input_ids])}
        if images:
            made = [prepared(image) for image in images]
            spare = (0, 0, 0, 0, 0, 0, 0)
            found["pixel_values"] = torch.stack(
                [torch.nn.functional.pad(tiles, (*spare, MOST + 1 - len(tiles))) for tiles, _ in made]
            )
            found["image_sizes"] = torch.tensor([[TILE * down, TILE * across] for _, (down, across) in made])
        return BatchFeature(found)


def prepared(image: Image.Image, most: int = MOST, tile: int = TILE) -> tuple[torch.Tensor, tuple[int, int]]:
    """The whole image and its tiles, [1 + down * across, 3, tile, tile], and (down, across)."""
    upright = image.width < image.height
    if upright:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    scale = max(n for n in range(1, most + 1) if n * math.ceil(n / ratio) <= most)
    image = image.resize((scale * tile, max(int(scale * tile / ratio), 1)), Image.Resampling.BILINEAR)
    padded = Image.new("RGB", (image.width, -(-image.height // tile) * tile), (255, 255, 255))
    padded.paste(image, (0, (padded.height - image.height) // 2))
    if upright:
        padded = padded.transpose(Image.Transpose.TRANSPOSE)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    pixels = (torch.from_numpy(np.array(padded)).permute(2, 0, 1).float().div(255) - mean) / std
    whole = torch.nn.functional.interpolate(pixels[None], size=(tile, tile), mode="bicubic")
    across, down = padded.width // tile, padded.height // tile
    cut = [
        pixels[None, :, row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
        for row in range(down)
        for column in range(across)
    ]
    return torch.cat([whole, *cut]), (down, across)
