"""The images that scripts give: PIL images, arrays, embeddings, and the wrappers of vLLM's older pages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from engine.errors import ModelLoadError
from engine.families.preprocessor import GRID
from engine.families.registry import family_of
from engine.messages import EMBEDDINGS
from engine.weights import weight_files
from handlers.errors import ImageError, InvalidRequest
from handlers.request import EmbeddingsPart, Grid, ImagePart, LoadedEmbeddings, MediaPart
from properties.configuration import read_model_config
from properties.model import read_object

Floats = npt.NDArray[np.float32]

_PROJECTOR = "multi_modal_projector."
_WANTED = "give a PIL image, an array of height x width x 3 bytes, or embeddings of tokens x hidden size"


@dataclass(frozen=True, slots=True)
class ImagePixelData:
    """An image: a PIL image, or the tensor that the model's processor made of one."""

    image: Any


@dataclass(frozen=True, slots=True)
class ImageFeatureData:
    """Features of an image from the model's vision tower, before the projector."""

    image_features: Any


@dataclass(frozen=True, slots=True)
class MultiModalData:
    """vLLM's wrapper up to 0.4: pixels in four dimensions, or features in three."""

    class Type(Enum):
        """Kind of data; there is only one."""

        IMAGE = auto()

    type: Type
    data: Any


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """What an image becomes in a prompt: `count` tokens of this id."""

    token_id: int
    count: int


class PromptImages:
    """Reads the images that a script gives."""

    def __init__(self, model_path: Path, counted: Callable[[MediaPart], ImageTokens], feature_size: int | None) -> None:
        """Prepare to read images.

        Args:
            model_path: The model's directory.
            counted: Returns the tokens that an image becomes in a prompt. Slow.
            feature_size: The value of option.image_feature_size.
        """
        self._path = model_path
        self._counted = counted
        self._feature_size = feature_size
        self._token_id: int | None = None

    def read(self, given: Any) -> list[MediaPart]:
        """Read `multi_modal_data`. Raises InvalidRequest, and ImageError for a single image."""
        parts = [self._part(index, item) for index, item in enumerate(_items(given))]
        if len({type(part) for part in parts}) > 1:
            raise InvalidRequest("a prompt can have images or embeddings, not both")
        return parts

    def sizes(self, part: MediaPart) -> Iterator[int]:
        """Yield how many placeholders may stand for an image, if there is one for each of its tokens."""
        if self._feature_size is not None:
            yield self._feature_size
        yield self._count(part).count

    def token_id(self, part: MediaPart) -> int:
        """Return the token id of placeholders."""
        return self._count(part).token_id if self._token_id is None else self._token_id

    def _count(self, part: MediaPart) -> ImageTokens:
        found = self._counted(part)
        self._token_id = found.token_id
        return found

    def _part(self, index: int, item: Any) -> MediaPart:
        features = isinstance(item, ImageFeatureData)
        grid: Grid | None = None
        if isinstance(item, ImageFeatureData):
            item = item.image_features
        elif isinstance(item, ImagePixelData):
            item = item.image
        elif isinstance(item, _Embeddings):
            item, grid = item.rows, item.grid
        if isinstance(item, Image.Image) and not features:
            return ImagePart("", given=item)
        array = _array(item)
        if array is None:
            raise ImageError(index, f"it is a {type(item).__name__}; {_WANTED}")
        if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] in (3, 4) and not features:
            return ImagePart("", given=Image.fromarray(array))
        while array.ndim > 2 and array.shape[0] == 1:
            array = array[0]
        if array.ndim == 3 and array.shape[0] == 3 and not features:
            return ImagePart("", given=self._upright(index, array.astype(np.float32)))
        if array.ndim != 2 or not array.size or array.dtype == np.uint8:
            raise ImageError(index, f"it is an array of the shape {list(array.shape)}; {_WANTED}")
        rows = array.astype(np.float32)
        if features:
            rows = self._projected(index, rows)
        largest = float(np.abs(rows).max())
        if not np.isfinite(largest):
            raise ImageError(index, "it holds numbers that are not finite in float32")
        shape = b"rows %d %d " % rows.shape + (b"" if grid is None else b"%d %d %d " % grid)
        digest = hashlib.sha256(shape + rows.tobytes()).digest()
        return EmbeddingsPart("", given=LoadedEmbeddings(rows, largest, grid, digest))

    def _upright(self, index: int, pixels: Floats) -> Image.Image:
        """Undo what a processor did to these pixels, in 256 levels: the image is prepared again like any other."""
        mean, std, scale = self._normalization
        if mean is None:
            raise ImageError(index, "the model's preprocessor_config.json does not say what its pixels mean")
        levels = (pixels.transpose(1, 2, 0) * std + mean) / scale
        return Image.fromarray(np.rint(levels).clip(0, 255).astype(np.uint8))

    @cached_property
    def _normalization(self) -> tuple[Any, Any, float]:
        """Return mean, standard deviation, and the factor of a level, from the model's processor."""
        for name, within in (("processor_config.json", "image_processor"), ("preprocessor_config.json", "")):
            try:
                config = read_object(self._path / name)
                config = config[within] if within else config
                mean, std = (np.asarray(config[key], np.float32) for key in ("image_mean", "image_std"))
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if config.get("do_normalize") is False:
                mean, std = np.zeros_like(mean), np.ones_like(std)
            scale = config.get("rescale_factor", 1 / 255)
            return mean, std, 1.0 if config.get("do_rescale") is False else float(scale)
        return None, None, 1.0

    def _projected(self, index: int, features: Floats) -> Floats:
        """Apply Llava's projector, as the model's own code does: linear, activation, linear."""
        import torch
        from transformers.activations import ACT2FN

        weights = self._projector
        config = read_model_config(self._path) or {}
        wide = weights.get("linear_1.weight")
        family = family_of(str(config.get("model_type")))
        if wide is None or family is None or not family.preprocessor or not family.preprocessor.takes_features:
            raise ImageError(index, "features are taken by Llava only: give the image itself, or embeddings")
        if features.shape[1] != wide.shape[1]:
            raise ImageError(
                index, f"its features have the shape {list(features.shape)}; wanted: [tokens, {wide.shape[1]}]"
            )
        with torch.inference_mode():
            rows = torch.nn.functional.linear(torch.from_numpy(features), wide, weights.get("linear_1.bias"))
            rows = ACT2FN[config.get("projector_hidden_act", "gelu")](rows)
            rows = torch.nn.functional.linear(rows, weights["linear_2.weight"], weights.get("linear_2.bias"))
        found: Floats = rows.numpy()
        return found

    @cached_property
    def _projector(self) -> dict[str, Any]:
        from safetensors import safe_open

        found = {}
        try:
            for file in weight_files(self._path):
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                        if _PROJECTOR in name:
                            found[name.partition(_PROJECTOR)[2]] = tensors.get_tensor(name).float()
        except ModelLoadError as error:
            raise InvalidRequest(f"features cannot be taken: {error}") from error
        return found


@dataclass(frozen=True, slots=True)
class _Embeddings:
    rows: Any
    grid: Grid | None


def _items(given: Any) -> list[Any]:
    """Return one item for each image."""
    if isinstance(given, MultiModalData):
        pixels = getattr(given.data, "ndim", 0) != 3
        given = ImagePixelData(given.data) if pixels else ImageFeatureData(given.data)
    if given is None:
        return []
    if isinstance(given, ImagePixelData | ImageFeatureData):
        return [given]
    if not isinstance(given, Mapping):
        raise InvalidRequest('multi_modal_data must be a dict: {"image": image or list of images}')
    for modality, items in given.items():
        if modality != "image" and items is not None and not (isinstance(items, list) and not items):
            raise InvalidRequest(f"multi_modal_data: {str(modality)[:40]!r} is not supported; allowed: 'image'")
    items = given.get("image")
    if items is None:
        return []
    if isinstance(items, Mapping):
        return _embeddings(items)
    if isinstance(items, list | tuple):
        return list(items)
    shape: tuple[int, ...] = tuple(getattr(items, "shape", ()))
    several = len(shape) == 3 and shape[0] not in (1, 3) and shape[2] not in (3, 4)
    return list(items) if several else [items]


def _embeddings(given: Mapping[str, Any]) -> list[Any]:
    """Read vLLM's form for models that need to know how the patches are arranged."""
    if unknown := [str(name)[:40] for name in given if name not in (EMBEDDINGS, GRID)]:
        raise InvalidRequest(f"multi_modal_data: {unknown[0]!r} is not supported; allowed: {EMBEDDINGS}, {GRID}")
    rows, grids = _array(given.get(EMBEDDINGS)), _array(given.get(GRID))
    if rows is None or rows.ndim not in (2, 3):
        raise InvalidRequest(f"multi_modal_data: {EMBEDDINGS} must be an array of tokens x hidden size")
    each = [rows] if rows.ndim == 2 else list(rows)
    if grids is None:
        return [_Embeddings(one, None) for one in each]
    if grids.size != 3 * len(each):
        raise InvalidRequest(f"multi_modal_data: {GRID} must be three numbers for each of {len(each)} images")
    return [
        _Embeddings(one, (int(grid[0]), int(grid[1]), int(grid[2])))
        for one, grid in zip(each, grids.reshape(-1, 3), strict=True)
    ]


def _array(item: Any) -> npt.NDArray[Any] | None:
    """Return an array or a tensor of numbers as an array; None for anything else."""
    if hasattr(item, "detach") and hasattr(item, "numpy"):
        item = item.detach().cpu()
        item = (item.float() if item.is_floating_point() else item).numpy()
    if isinstance(item, np.ndarray) and item.dtype.kind in "fiu":
        return item
    return None
