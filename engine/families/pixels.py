"""The usual preparation of an image (resize, crop, rescale, normalise), without the steps that cost most of the time.

transformers has two versions of each image processor: with torchvision it resizes with torch, without it with
Pillow. For a photograph a few values in a thousand then differ by one level of 255. Both convert an image to
an array and back, or copy it, more often than necessary. `Recipe` performs the same steps with the same resize
and gives the same numbers; `Preprocessor.from_model` compares the two, and uses the processor if anything differs.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

ProcessorBackend = Literal["auto", "torchvision", "pil"]
"""Library whose arithmetic is used. `auto` is transformers' own choice on this machine: torchvision if it is
installed."""

Pixels = npt.NDArray[np.float32]
Levels = npt.NDArray[np.uint8]
Resize = Callable[[Image.Image, tuple[int, int], Image.Resampling], Levels]
"""(image, (width, height), filter) -> [height, width, 3]"""

_TORCH_MODES = {
    Image.Resampling.BICUBIC: "bicubic",
    Image.Resampling.BILINEAR: "bilinear",
    Image.Resampling.LANCZOS: "lanczos",
}


# An image's own memory is read and never written.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def processor_options(backend: ProcessorBackend) -> dict[str, Any]:
    """Return the arguments of transformers' `AutoImageProcessor.from_pretrained` for this backend."""
    if backend == "auto" or (backend == "torchvision" and find_spec("torchvision") is None):
        return {}
    return {"backend": backend}


class Recipe(msgspec.Struct, frozen=True):
    """How to make pixels without transformers: all that another process needs.

    Families with their own way of resizing leave out size and crop.

    Attributes:
        size: As in the processor.
        crop: (height, width); None without a crop.
        resample: One of Pillow's filters.
        with_torch: Whether to resize as torchvision does.
        table: float32 [3, 256]: the value of each 8-bit level in each channel.
    """

    size: dict[str, int]
    crop: tuple[int, int] | None
    resample: int
    with_torch: bool
    table: bytes

    @property
    def filter(self) -> Image.Resampling:
        return Image.Resampling(self.resample)

    def resized(self, image: Image.Image, size: tuple[int, int]) -> Levels:
        """Resize to `size`, (width, height)."""
        resize: Resize = resize_with_torch if self.with_torch else resize_with_pillow
        return resize(image, size, self.filter)

    def pixels(self, image: Image.Image) -> Pixels:
        """Map an RGB image to [3, height, width] by the whole recipe. Thread-safe."""
        levels = self.resized(image, self._target(*image.size))
        if self.crop is not None:
            # If an image smaller than the crop gets an odd number of black columns or rows, torchvision puts the
            # smaller half first.
            levels = _center_crop(levels, *self.crop, pads_evenly=self.with_torch)
        return self.values(levels)

    def _target(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after resizing; `shortest_edge` keeps the aspect and truncates fractions."""
        if "height" in self.size:
            return self.size["width"], self.size["height"]
        edge = self.size["shortest_edge"]
        if width <= height:
            return edge, int(edge * height / width)
        return int(edge * width / height), edge

    def values(self, levels: Levels) -> Pixels:
        """Map levels [height, width, 3] to values [3, height, width]."""
        table = np.frombuffer(self.table, np.float32).reshape(3, 256)
        out = np.empty((3, *levels.shape[:2]), dtype=np.float32)
        for channel in range(3):
            np.take(table[channel], levels[..., channel], out=out[channel])
        return out


def size_of(processor: Any) -> dict[str, int]:
    """Return the processor's size without the edges that it leaves open."""
    return {key: int(edge) for key, edge in dict(getattr(processor, "size", None) or {}).items() if edge}


def recipe_of(processor: Any, backend: str) -> Recipe | None:
    """Return the recipe of this processor; None if it has a step that is unknown here."""
    size = size_of(processor)
    if not getattr(processor, "do_resize", False) or getattr(processor, "do_pad", False):
        return None
    if set(size) not in ({"height", "width"}, {"shortest_edge"}):
        return None
    crop = None
    if getattr(processor, "do_center_crop", False):
        crop_size = processor.crop_size
        crop = (int(crop_size["height"]), int(crop_size["width"]))
    return value_recipe(processor, backend, size, crop)


def value_recipe(
    processor: Any, backend: str, size: dict[str, int] | None = None, crop: tuple[int, int] | None = None
) -> Recipe | None:
    """Return how this processor resizes and maps 8-bit levels; None if its way of resizing is unknown here."""
    resample = Image.Resampling(int(processor.resample))
    if backend != "torchvision":
        return Recipe(size or {}, crop, int(resample), False, _value_table(processor).tobytes())
    if resample not in _TORCH_MODES or not _resizes_bytes(resample):
        return None
    return Recipe(size or {}, crop, int(resample), True, _fused_value_table(processor).tobytes())


def resize_with_pillow(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Levels:
    """Resize as Pillow does."""
    return np.asarray(image.resize(size, resample))


def resize_with_torch(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Levels:
    """Resize as torchvision does, several times faster than Pillow."""
    import torch

    levels = np.asarray(image)
    if image.size == size:
        return levels
    width, height = size
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(levels).permute(2, 0, 1).unsqueeze(0),
        size=(height, width),
        mode=_TORCH_MODES[resample],
        align_corners=False,
        antialias=True,
    )
    return resized.squeeze(0).permute(1, 2, 0).numpy()


def _resizes_bytes(resample: Image.Resampling) -> bool:
    """Whether torchvision passes bytes to torch on this machine; on others it converts to float and back."""
    import torch

    if resample == Image.Resampling.LANCZOS:
        return _torch_has_lanczos()
    fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return resample == Image.Resampling.BICUBIC or fast or platform.machine() in ("aarch64", "arm64")


def _torch_has_lanczos() -> bool:
    """Older versions of torch do not have it, and transformers then uses another filter."""
    try:
        resize_with_torch(Image.new("RGB", (4, 4)), (2, 2), Image.Resampling.LANCZOS)
    except (NotImplementedError, ValueError):
        return False
    return True


def _value_table(processor: Any) -> npt.NDArray[np.float32]:
    """[3, 256]: the value of each 8-bit level, computed once by the processor's own methods."""
    levels = np.repeat(np.arange(256, dtype=np.uint8)[None, None, :], 3, axis=0)
    values = levels.astype(np.float32)
    if getattr(processor, "do_rescale", False):
        values = processor.rescale(values, processor.rescale_factor)
    if getattr(processor, "do_normalize", False):
        values = processor.normalize(values, processor.image_mean, processor.image_std)
    return np.ascontiguousarray(values[:, 0, :], dtype=np.float32)


def _fused_value_table(processor: Any) -> npt.NDArray[np.float32]:
    """The same table for torchvision, which rescales and normalises in one step: (level - 255 mean) / (255 std)."""
    import torch

    values = torch.arange(256, dtype=torch.float32).repeat(3, 1)
    rescales = getattr(processor, "do_rescale", False)
    if getattr(processor, "do_normalize", False):
        full = 1.0 / processor.rescale_factor if rescales else 1.0
        mean, std = (
            torch.tensor(np.broadcast_to(value, 3).tolist())
            * full  # a single number applies to all channels, as in Fuyu
            for value in (processor.image_mean, processor.image_std)
        )
        values = (values - mean[:, None]) / std[:, None]
    elif rescales:
        values = values * processor.rescale_factor
    return np.ascontiguousarray(values.numpy(), dtype=np.float32)


def _center_crop(levels: Levels, height: int, width: int, *, pads_evenly: bool) -> Levels:
    """Crop the middle of the image; if the image is too small, black is added around it."""
    over = (levels.shape[0] - height, levels.shape[1] - width)
    top, left = (-(-extra // 2) if pads_evenly and extra < 0 else extra // 2 for extra in over)
    if min(over) < 0:
        before = (max(0, -top), max(0, -left))
        after = (max(0, -over[0] - before[0]), max(0, -over[1] - before[1]))
        levels = np.pad(levels, ((before[0], after[0]), (before[1], after[1]), (0, 0)))
        top, left = max(0, top), max(0, left)
    return levels[top : top + height, left : left + width]
