"""Options that vLLM had before it asked the model itself. They are checked against the model and change nothing."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import BaseModel, BeforeValidator

from properties.field import option
from properties.values import Allowed, Count, Positive


def _sizes(value: object) -> object:
    if not isinstance(value, str):
        return value
    return [part.strip() for part in value.strip("()[] ").split(",") if part.strip()]


def _four(sizes: list[int]) -> list[int]:
    if len(sizes) != 4:
        raise ValueError("four numbers are needed")
    return sizes


Shape = Annotated[
    list[Annotated[int, Ge(1)]],
    BeforeValidator(lambda value: _four(found) if isinstance(found := _sizes(value), list) else found),
    Allowed("images, channels, height and width, each from 1: 1,3,336,336"),
]


class RetiredSettings(BaseModel):
    """Retired: what the model says itself"""

    image_input_type: Literal["pixel_values", "image_features"] | None = option(
        "What an image is to the model; only pixel_values is served.", default=None
    )
    image_token_id: Count | None = option("The token that stands for an image in a prompt.", default=None)
    image_input_shape: Shape | None = option("Shape of the largest prepared image.", default=None)
    image_feature_size: Positive | None = option(
        "Tokens that an image of image_input_shape takes.", default=None, unit="tokens"
    )


RETIRED = tuple(RetiredSettings.model_fields)
