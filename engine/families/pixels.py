"""The usual picture preparation (resize, crop, rescale, normalise), without the detours that cost most of it.

transformers' processors turn a picture into an array and back before resizing; for a megapixel photograph that
costs more than the resize. `PixelPipeline` does the same steps on the picture itself and gives the same numbers:
it checks that against the processor when it is built, and uses the processor where anything differs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

_PROBES = ((40, 64), (129, 77), (301, 300))
"""Sizes (width, height) of the pictures that the two ways are compared on: upscaled, odd, downscaled."""


class PixelPipeline:
    """Callable: an RGB picture -> float32 [3, height, width]. Thread-safe."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._direct = _Direct.of(processor)
        if self._direct is not None and not self._agrees(self._direct):
            self._direct = None

    @property
    def is_direct(self) -> bool:
        """The fast way is in use."""
        return self._direct is not None

    def __call__(self, image: Image.Image) -> npt.NDArray[np.float32]:
        return self._reference(image) if self._direct is None else self._direct(image)

    def _reference(self, image: Image.Image) -> npt.NDArray[np.float32]:
        pixels = self._processor(images=image, return_tensors="np")["pixel_values"]
        return np.asarray(pixels[0], dtype=np.float32)

    def _agrees(self, direct: _Direct) -> bool:
        random = np.random.default_rng(0)
        for width, height in _PROBES:
            image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
            want, got = self._reference(image), direct(image)
            if want.shape != got.shape or not np.array_equal(want, got):
                return False
        return True


class _Direct:
    def __init__(
        self,
        size: dict[str, int],
        crop: tuple[int, int] | None,
        resample: Image.Resampling,
        table: npt.NDArray[np.float32],
    ) -> None:
        self._size = size
        self._crop = crop
        self._resample = resample
        self._table = table

    @classmethod
    def of(cls, processor: Any) -> _Direct | None:
        """The direct way for this processor, or None where it has a step that is not known here."""
        size = dict(getattr(processor, "size", None) or {})
        if not getattr(processor, "do_resize", False) or getattr(processor, "do_pad", False):
            return None
        if set(size) not in ({"height", "width"}, {"shortest_edge"}):
            return None
        crop = None
        if getattr(processor, "do_center_crop", False):
            crop_size = processor.crop_size
            crop = (int(crop_size["height"]), int(crop_size["width"]))
        return cls(size, crop, Image.Resampling(int(processor.resample)), _value_table(processor))

    def __call__(self, image: Image.Image) -> npt.NDArray[np.float32]:
        image = image.resize(self._target(*image.size), self._resample)
        if self._crop is not None:
            image = _center_crop(image, *self._crop)
        levels = np.asarray(image)
        out = np.empty((3, *levels.shape[:2]), dtype=np.float32)
        for channel in range(3):
            np.take(self._table[channel], levels[..., channel], out=out[channel])
        return out

    def _target(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after resizing; `shortest_edge` keeps the aspect and cuts fractions off."""
        if "height" in self._size:
            return self._size["width"], self._size["height"]
        edge = self._size["shortest_edge"]
        if width <= height:
            return edge, int(edge * height / width)
        return int(edge * width / height), edge


def _value_table(processor: Any) -> npt.NDArray[np.float32]:
    """[3, 256]: what each 8-bit level becomes. There are only 256 of them, so the arithmetic is done once,
    by the processor's own methods."""
    levels = np.repeat(np.arange(256, dtype=np.uint8)[None, None, :], 3, axis=0)
    values = levels.astype(np.float32)
    if getattr(processor, "do_rescale", False):
        values = processor.rescale(values, processor.rescale_factor)
    if getattr(processor, "do_normalize", False):
        values = processor.normalize(values, processor.image_mean, processor.image_std)
    return np.ascontiguousarray(values[:, 0, :], dtype=np.float32)


def _center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of the picture; where it is too small, black is added around it."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
