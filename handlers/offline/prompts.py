"""What scripts give as prompts and images, also in the forms of vLLM's older pages, as requests to the backend."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from engine.errors import ModelLoadError
from engine.families.registry import family_of
from engine.sampling_params import MAX_INTEGER
from engine.weights import weight_files
from handlers.errors import ImageError, InvalidRequest
from handlers.protocols.openai.messages import read_messages
from handlers.request import (
    ChatPrompt,
    EmbeddingsPart,
    Grid,
    ImagePart,
    LoadedEmbeddings,
    MediaPart,
    Part,
    TextPart,
    TextPrompt,
)
from properties.configuration import read_model_config

Floats = npt.NDArray[np.float32]
Span = tuple[int, int]

_WRITTEN = (
    r"<\|vision_start\|><\|image_pad\|><\|vision_end\|>",
    r"\(<image>\./</image>\)",
    r"<\|image_(?P<number>[1-9][0-9]{0,3})\|>",
    r"<image>",
    r"<\|image\|>",
    r"<\|image_pad\|>",
    r"<start_of_image>",
    r"\[IMG\]",
)
"""Placeholders of an image in the model cards of the served families and in vLLM's documentation."""

_KEYS = {"prompt", "prompt_token_ids", "multi_modal_data"}
_IGNORED_KEYS = {"multi_modal_uuids", "type", "cache_salt"}

_ROWS, _GRID = "image_embeds", "image_grid_thw"
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
    """Reads the images that a script gives.

    counted: slow; returns the tokens that an image becomes. feature_size: the value of `image_feature_size`.
    """

    def __init__(
        self, model_path: Path, counted: Callable[[MediaPart], ImageTokens], feature_size: int | None
    ) -> None:
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
        digest = hashlib.sha256(b"rows %d %d " % rows.shape + rows.tobytes()).digest()
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
                config = json.loads((self._path / name).read_text("utf-8"))
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
        if (
            wide is None
            or family is None
            or not family.preprocessor
            or not family.preprocessor.takes_features
        ):
            raise ImageError(index, "features are taken by Llava only: give the image itself, or embeddings")
        if features.shape[1] != wide.shape[1]:
            raise ImageError(
                index,
                f"its features have the shape {list(features.shape)}; wanted: [tokens, {wide.shape[1]}]",
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
            raise InvalidRequest(
                f"multi_modal_data: {str(modality)[:40]!r} is not supported; allowed: 'image'"
            )
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
    if unknown := [str(name)[:40] for name in given if name not in (_ROWS, _GRID)]:
        raise InvalidRequest(f"multi_modal_data: {unknown[0]!r} is not supported; allowed: {_ROWS}, {_GRID}")
    rows, grids = _array(given.get(_ROWS)), _array(given.get(_GRID))
    if rows is None or rows.ndim not in (2, 3):
        raise InvalidRequest(f"multi_modal_data: {_ROWS} must be an array of tokens x hidden size")
    each = [rows] if rows.ndim == 2 else list(rows)
    if grids is None:
        return [_Embeddings(one, None) for one in each]
    if grids.size != 3 * len(each):
        raise InvalidRequest(
            f"multi_modal_data: {_GRID} must be three numbers for each of {len(each)} images"
        )
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


def prompts_with_data(prompts: Any, prompt_token_ids: Sequence[Any] | None, data: Any) -> Any:
    """Return prompts from the arguments of vLLM's `generate` up to 0.5, which took token ids and images separately."""
    if prompt_token_ids is None and data is None:
        return prompts
    ids = prompt_token_ids
    alone = isinstance(prompts, str) or (prompts is None and bool(ids) and isinstance(ids[0], int))  # type: ignore[index]
    texts = [prompts] if isinstance(prompts, str) else prompts
    token_ids = [ids] if ids is not None and alone and isinstance(ids[0], int) else ids
    count = len(texts) if texts is not None else len(token_ids or ())
    if isinstance(data, MultiModalData) and count > 1:
        data = [MultiModalData(data.type, data.data[number : number + 1]) for number in range(count)]
    each = list(data) if isinstance(data, list | tuple) else [data] * count
    for name, given in (("prompt_token_ids", token_ids), ("multi_modal_data", each)):
        if given is not None and len(given) != count:
            raise ValueError(f"{name}: give one for each of the {count} prompts")
    made = [
        {
            **({"prompt": texts[number]} if texts is not None else {}),
            **({"prompt_token_ids": token_ids[number]} if token_ids is not None else {}),
            "multi_modal_data": each[number],
        }
        for number in range(count)
    ]
    return made[0] if alone else made


def prompts_in(given: Any) -> tuple[list[Any], bool]:
    """Return `generate`'s argument as a list of prompts, and whether it was a single one. Raises TypeError."""
    if isinstance(given, str | Mapping) or _is_ids(given):
        return [given], True
    if isinstance(given, Sequence) and not isinstance(given, bytes):
        return list(given), False
    raise TypeError(f"a prompt is a text, a dict or a list of these, not {type(given).__name__}")


def conversations_in(given: Any) -> tuple[list[Any], bool]:
    """Return `chat`'s argument as a list of conversations, and whether it was a single one. Raises TypeError."""
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise TypeError(f"a conversation is a list of messages, not {type(given).__name__}")
    if given and isinstance(given[0], Mapping):
        return [given], True
    return list(given), False


def read_prompt(given: Any, placeholder: str | None, images: PromptImages) -> TextPrompt:
    """Read one of `generate`'s prompts. placeholder: the model's (see `Capabilities`). Raises InvalidRequest."""
    if isinstance(given, str):
        return TextPrompt(list(_parts(given, [], placeholder, images)))
    if _is_ids(given):
        return TextPrompt([], token_ids=_ids(given))
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"a prompt is a text, a dict or token ids, not {type(given).__name__}")
    for key in given:
        if key not in _KEYS | _IGNORED_KEYS and given[key] is not None:
            raise InvalidRequest(
                f"a prompt's {str(key)[:40]!r} is not supported; allowed: {', '.join(sorted(_KEYS))}"
            )
    media = images.read(given.get("multi_modal_data"))
    ids, text = given.get("prompt_token_ids"), given.get("prompt")
    if ids is not None:
        return TextPrompt(list(media), token_ids=_one_each(_ids(ids), media, images))
    if not isinstance(text, str):
        raise InvalidRequest("a prompt needs `prompt`, a text, or `prompt_token_ids`, a list of numbers")
    return TextPrompt(list(_parts(text, media, placeholder, images)))


def read_conversation(
    given: Any,
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[dict[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> ChatPrompt:
    """Read one of `chat`'s conversations. Raises InvalidRequest."""
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise InvalidRequest(f"a conversation is a list of messages, not {type(given).__name__}")
    return ChatPrompt(
        read_messages(list(given)),
        add_generation_prompt=add_generation_prompt and not continue_final_message,
        continue_final_message=continue_final_message,
        template=chat_template,
        template_kwargs=dict(chat_template_kwargs or {}),
        tools=tools,
    )


def _parts(
    text: str, given: Sequence[MediaPart], placeholder: str | None, images: PromptImages
) -> Iterator[Part]:
    """Yield the text with each image in place of its placeholder, or all images before a text without one."""
    pattern = "|".join(_WRITTEN)
    own = list(re.finditer(re.escape(placeholder), text)) if placeholder else []
    found = own or list(re.finditer(pattern, text))
    if not found:
        yield from given
        yield TextPart(text)
        return
    if not given and not own:
        yield TextPart(text)
        return
    spans = [match.span() for match in found]
    if len(found) > len(given) > 0:
        spans = _gathered(spans, given, images)
    order = _order(found, spans, given)
    at = 0
    for (start, end), index in zip(spans, order, strict=True):
        if start > at:
            yield TextPart(text[at:start])
        yield given[index]
        at = end
    if at < len(text):
        yield TextPart(text[at:])


def _gathered(spans: Sequence[Span], given: Sequence[MediaPart], images: PromptImages) -> list[Span]:
    """Join placeholders as vLLM did until 0.5: as many adjacent ones as an image has tokens stand for that image.

    Returns one span for each image, or the given spans if they cannot be divided in this way.
    """
    made: list[Span] = []
    at = 0
    for part in given:
        if at == len(spans):
            return list(spans)
        run = 1
        while at + run < len(spans) and spans[at + run][0] == spans[at + run - 1][1]:
            run += 1
        size = next((size for size in images.sizes(part) if size <= run), None)
        if size is None:
            return list(spans)
        made.append((spans[at][0], spans[at + size - 1][1]))
        at += size
    return made if at == len(spans) else list(spans)


def _order(found: Sequence[re.Match[str]], spans: Sequence[Span], given: Sequence[MediaPart]) -> list[int]:
    """Return the number of the image at each span: that of a numbered placeholder, else the next one."""
    count = len(given)
    if len(spans) != count:
        raise InvalidRequest(
            f"the prompt has {len(found)} placeholders of images ({found[0][0]}) and {count} images: "
            "write one for each, or none"
        )
    numbers = [match.groupdict().get("number") for match in found]
    if len(found) != count or any(number is None for number in numbers):
        return list(range(count))
    order = [int(cast(str, number)) - 1 for number in numbers]
    if sorted(order) != list(range(count)):
        raise InvalidRequest(f"the prompt's images must be numbered from 1 to {count}, each once")
    return order


def _one_each(ids: list[int], given: Sequence[MediaPart], images: PromptImages) -> list[int]:
    """Reduce the placeholders in a prompt of tokens to one for each image."""
    if not given:
        return ids
    token_id = images.token_id(given[0])
    spans = [(at, at + 1) for at, token in enumerate(ids) if token == token_id]
    if len(spans) <= len(given):
        return ids
    places = _gathered(spans, given, images)
    left_out = {at for start, end in places for at in range(start + 1, end)}
    return [token for at, token in enumerate(ids) if at not in left_out]


def _is_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(token) is int for token in given)


def _ids(given: Any) -> list[int]:
    ids = (
        [int(token) for token in given] if isinstance(given, Sequence) and not isinstance(given, str) else []
    )
    if not ids or not all(0 <= token <= MAX_INTEGER for token in ids):
        raise InvalidRequest("prompt_token_ids must be a list of token ids, at least one")
    return ids
