"""Llava-OneVision: as Llava-Next, with a SigLIP tower and many more grids.

The features of a large grid are shrunk. In a prompt with several images each image is used once, whole, on a
square of the mean colour.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from engine.errors import ModelLoadError
from engine.families.base import Family
from engine.families.llava_next import LlavaNextMetadata, LlavaNextModel, LlavaNextPreprocessor
from engine.families.preprocessor import Arrays, Layout, ModelFiles
from engine.families.tiles import Size

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PretrainedConfig

SEVERAL = 1
"""Variant of images that share their prompt with others."""

SHRINKS_ABOVE = 1.1


class LlavaOnevisionMetadata(LlavaNextMetadata, kw_only=True):
    """Metadata of a Llava-OneVision model.

    Attributes:
        most_tiles: An image's grid has at most as many features as this many tiles.
        mean: Mean colour, from 0 to 255 for each channel.
    """

    most_tiles: int
    mean: list[int]


class LlavaOnevisionPreprocessor(LlavaNextPreprocessor):
    metadata_type = LlavaOnevisionMetadata
    metadata: LlavaOnevisionMetadata
    num_variants = 2

    @classmethod
    def read(cls, model: ModelFiles) -> LlavaOnevisionMetadata:
        return LlavaOnevisionMetadata(
            **msgspec.structs.asdict(super().read(model)),
            most_tiles=_most_tiles(model.config),
            mean=[int(channel * 255) for channel in model.processor.image_mean],
        )

    def variant(self, num_images: int) -> int:
        return SEVERAL if num_images > 1 else 0

    def layout(self, width: int, height: int, variant: int = 0) -> Layout:
        if variant == SEVERAL:
            return Layout([self.metadata.image_token_id] * (self.metadata.patches**2 + 1))
        return super().layout(width, height)

    def grid(self, width: int, height: int) -> Size:
        rows, columns = super().grid(width, height)
        ratio = math.sqrt(rows * columns / (self.metadata.most_tiles * self.metadata.patches**2))
        if ratio > SHRINKS_ABOVE:
            return int(rows // ratio), int(columns // ratio)
        return rows, columns

    def direct(self, image: Image, variant: int = 0) -> Arrays:
        if variant != SEVERAL:
            return super().direct(image)
        from PIL import Image as images

        recipe = self.recipe
        square = images.new("RGB", (max(image.size),) * 2, tuple(self.metadata.mean))
        square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
        return {
            "pixel_values": recipe.values(recipe.resized(square, (self.metadata.tile, self.metadata.tile)))[None],
            "image_sizes": np.array([image.height, image.width]),
        }

    def reference(self, image: Image, variant: int = 0) -> Arrays:
        if variant != SEVERAL:
            return super().reference(image)
        # Passing the image twice makes a prompt with several images.
        out = self._processor(images=[[image, image]], return_tensors="np")
        return {name: np.asarray(out[name][0]) for name in self.tensor_names}


class LlavaOnevisionModel(LlavaNextModel):
    # One image has up to 37 tiles of 1.7 MB each.
    encode_batch = 4

    @classmethod
    def check(cls, config: PretrainedConfig) -> None:
        super().check(config)
        _most_tiles(config)

    def rows(self, features: torch.Tensor, image: dict[str, torch.Tensor]) -> torch.Tensor:
        model: Any = self.model.model
        sizes, ratio = [image["image_sizes"].tolist()], self.model.config.vision_aspect_ratio
        (rows,), _ = model.pack_image_features([features], sizes, model.image_newline, ratio)
        packed: torch.Tensor = rows
        return packed


def _most_tiles(config: PretrainedConfig) -> int:
    named = re.fullmatch(r"anyres_max_(\d+)", config.vision_aspect_ratio)
    if named is None:
        raise ModelLoadError(
            f"vision_aspect_ratio {config.vision_aspect_ratio!r} of config.json is not supported; supported: "
            "anyres_max_9 and other numbers"
        )
    return int(named[1])


FAMILY = Family(LlavaOnevisionModel, LlavaOnevisionPreprocessor)
