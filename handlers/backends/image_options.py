"""Which options about images do not fit the model: unused, untrue of it, or more than its context holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import RequestRejected
from properties.configuration import read_model_config
from properties.names import key_of
from properties.problem import Problem
from properties.settings import RETIRED

if TYPE_CHECKING:
    from engine.families.preprocessor import PreparedImage, Preprocessor
    from properties.settings import Settings


ABOUT_IMAGES = (
    "limit_mm_per_prompt",
    "enable_mm_embeds",
    "image_placeholder_token",
    "image_processor_backend",
    "encoder_cache_mb",
    "mm_processor_kwargs",
)

_SMALLEST = 1 << 12
"""Pixels of the smallest image that is examined for whether it fills the context."""

_ASPECTS = 12
"""Half powers of two between the sides of the widest and tallest images that are examined: 64:1 and 1:64."""

_NO_LIMIT = 100
"""A limit as high as this means that images are not limited, as in scripts."""


def unused_by_text(settings: Settings) -> list[Problem]:
    """Return a warning for each option about images that was set for a model without images."""
    written = {name: getattr(settings, name) for name in ABOUT_IMAGES if name in settings.model_fields_set}
    return [
        Problem(f"{key_of(name)} has no effect: the model takes no images", name)
        for name, value in written.items()
        if value != type(settings).model_fields[name].default and value != {"image": 0, "video": 0, "audio": 0}
    ]


def wanted(settings: Settings) -> dict[str, object]:
    """Return what the operator says of the model's images, as old versions of vLLM wanted it, by the options' names."""
    return {name: value for name in RETIRED if (value := getattr(settings, name)) is not None}


def contradictions(settings: Settings, model_path: Path, preprocessor: Preprocessor[Any] | None) -> list[str]:
    """Return each option that differs from the model, with both values. Slow if there is a preprocessor.

    preprocessor: None for a model without images, and if only another backend knows the model; shape and size are then
    not checked. Raises ConfigurationError for a config.json that cannot be read.
    """
    given = wanted(settings)
    if not given:
        return []
    config = read_model_config(model_path) or {}
    token = config.get("image_token_id", config.get("image_token_index"))
    if preprocessor is not None:
        token = preprocessor.image_token_id
    if preprocessor is None and not ("vision_config" in config or token is not None):
        names = ", ".join(key_of(name) for name in given)
        return [f"{names} cannot be: this model takes no images"]
    found: list[str] = []
    if given.get("image_input_type") == "image_features":
        found.append(_told("image_input_type", "image_features", "pixel_values"))
    if token is not None and given.get("image_token_id", token) != token:
        found.append(_told("image_token_id", given["image_token_id"], token))
    if preprocessor is not None:
        found += _shapes(settings, preprocessor)
    return found


def _shapes(settings: Settings, preprocessor: Preprocessor[Any]) -> list[str]:
    """Prepare blank images and compare them with the options.

    Where images are cut into tiles or patches, the shape describes the size of the incoming images, which is not a
    property of the model: then only their tokens are counted.
    """
    shape, tokens = settings.image_input_shape, settings.image_feature_size
    if shape is None and tokens is None:
        return []
    found = []
    size = (shape[3], shape[2]) if shape is not None else (336, 336)
    prepared = _prepare(preprocessor, size)
    own = next((array.shape for array in prepared.tensors.values() if array.ndim == 3), None)
    if shape is not None and own is not None and tuple(shape[1:]) != own:
        found.append(_told("image_input_shape", ",".join(map(str, shape)), ",".join(map(str, (shape[0], *own)))))
    fixed = shape is not None or _count(_prepare(preprocessor, (672, 224))) == _count(prepared)
    if tokens is not None and fixed and tokens != _count(prepared):
        found.append(_told("image_feature_size", tokens, _count(prepared)))
    return found


def _prepare(preprocessor: Preprocessor[Any], size: tuple[int, int]) -> PreparedImage:
    from PIL import Image

    return preprocessor.prepare(Image.new("RGB", size))


def _count(prepared: PreparedImage) -> int:
    return len(prepared.token_ids) if prepared.is_embed is None else sum(prepared.is_embed)


def _told(name: str, given: object, own: object) -> str:
    return f"{key_of(name)} is {given}, but the model's is {own}: leave it out"


def image_tokens(preprocessor: Preprocessor[Any], width: int, height: int) -> int | None:
    """Return the tokens that one image of that size takes in a prompt; None if the model does not accept it."""
    try:
        return len(preprocessor.layout(width, height).token_ids)
    except RequestRejected:
        return None


def crowded(settings: Settings, preprocessor: Preprocessor[Any], max_model_len: int) -> str | None:
    """Return a message if as many images as are allowed, or one of them, can fill the context; else None.

    Of the shapes that option.max_image_pixels allows, it names the smallest that fills the context, and the one of the
    most tokens.
    """
    images = settings.limit_mm_per_prompt.get("image", 1)
    counts = {size: image_tokens(preprocessor, *size) or 0 for size in _sizes(settings.max_image_pixels)}
    most = max(counts, key=lambda size: counts[size])
    images = 1 if images >= _NO_LIMIT or counts[most] >= max_model_len else images
    first = next((size for size, count in counts.items() if images * count >= max_model_len), None)
    if first is None:
        return None
    told, verb = "an image", "takes"
    if images > 1:
        told, verb = f"{images} images (option.limit_mm_per_prompt)", "take"
    if len({count for count in counts.values() if count}) > 1:
        told += f" of {first[0]}x{first[1]} pixels"
    told += f" {verb} {images * counts[first]} tokens"
    if counts[most] > counts[first]:
        told += f" (of {most[0]}x{most[1]}, which option.max_image_pixels allows, {images * counts[most]})"
    return (
        f"{told}, and the context holds {max_model_len}: such requests are refused; raise option.max_model_len, or "
        "lower the number or the size of images"
    )


def _sizes(max_pixels: int) -> list[tuple[int, int]]:
    """Return the (width, height) of images from small ones to those of `max_pixels`, squares first in each size."""
    areas = [max_pixels]
    while areas[-1] > _SMALLEST:
        areas.append(areas[-1] // 2)
    found = []
    for area in reversed(areas):
        for step in sorted(range(-_ASPECTS, _ASPECTS + 1), key=abs):
            width = max(1, int(math.sqrt(area * 2 ** (step / 2))))
            found.append((width, max(1, area // width)))
    return found
