"""Llava-OneVision: as Llava-Next, with a SigLIP tower and many more grids, whose features are shrunk where they are too
many. In a prompt with several images each is seen once, whole, on a square of the mean colour.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import ModelLoadError
from engine.families.anyres import Size
from engine.families.base import Arrays, Family, Layout, ModelFiles
from engine.families.llava_next import LlavaNextFacts, LlavaNextModel, LlavaNextPreprocessor

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PretrainedConfig

SEVERAL = 1
"""The variant of images that share their prompt with others."""

SHRINKS_ABOVE = 1.1


class LlavaOnevisionFacts(LlavaNextFacts, kw_only=True):
    """most_tiles: worth of features that an image's grid may have. mean: the colour, of 255."""

    most_tiles: int
    mean: list[int]


class LlavaOnevisionPreprocessor(LlavaNextPreprocessor):
    facts_type = LlavaOnevisionFacts
    facts: LlavaOnevisionFacts
    num_variants = 2

    @classmethod
    def read(cls, model: ModelFiles) -> LlavaOnevisionFacts:
        facts = super().read(model)
        return LlavaOnevisionFacts(
            image_token_id=facts.image_token_id,
            recipe=facts.recipe,
            tile=facts.tile,
            patches=facts.patches,
            resolutions=facts.resolutions,
            most_tiles=_most_tiles(model.config),
            mean=[int(channel * 255) for channel in model.processor.image_mean],
        )

    def variant(self, num_images: int) -> int:
        return SEVERAL if num_images > 1 else 0

    def layout(self, width: int, height: int, variant: int = 0) -> Layout:
        if variant == SEVERAL:
            return Layout([self.facts.image_token_id] * (self.facts.patches**2 + 1))
        return super().layout(width, height)

    def grid(self, width: int, height: int) -> Size:
        rows, columns = super().grid(width, height)
        ratio = math.sqrt(rows * columns / (self.facts.most_tiles * self.facts.patches**2))
        if ratio > SHRINKS_ABOVE:
            return int(rows // ratio), int(columns // ratio)
        return rows, columns

    def direct(self, image: Image, variant: int = 0) -> Arrays:
        if variant != SEVERAL:
            return super().direct(image)
        from PIL import Image as images

        recipe = self.facts.recipe
        assert recipe is not None
        square = images.new("RGB", (max(image.size),) * 2, tuple(self.facts.mean))
        square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
        return {
            "pixel_values": recipe.values(recipe.resized(square, (self.facts.tile, self.facts.tile)))[None],
            "image_sizes": np.array([image.height, image.width]),
        }

    def reference(self, image: Image, variant: int = 0) -> Arrays:
        if variant != SEVERAL:
            return super().reference(image)
        # the image twice is a prompt with several
        out = self._processor(images=[[image, image]], return_tensors="np")
        return {name: np.asarray(out[name][0]) for name in self.tensor_names}


class LlavaOnevisionModel(LlavaNextModel):
    # the pixels of one are up to 37 tiles, of 1.7 MB each
    encode_batch = 4

    @classmethod
    def check(cls, config: PretrainedConfig) -> None:
        super().check(config)
        _most_tiles(config)

    def packed(self, features: Sequence[torch.Tensor], sizes: list[list[int]]) -> list[torch.Tensor]:
        model: Any = self.model.model
        ratio = self.model.config.vision_aspect_ratio
        rows, _ = model.pack_image_features(features, sizes, model.image_newline, ratio)
        return list(rows)


def _most_tiles(config: PretrainedConfig) -> int:
    named = re.fullmatch(r"anyres_max_(\d+)", config.vision_aspect_ratio)
    if named is None:
        raise ModelLoadError(
            f"vision_aspect_ratio {config.vision_aspect_ratio!r} of config.json is not supported; supported: "
            "anyres_max_9 and other numbers"
        )
    return int(named[1])


FAMILY = Family(LlavaOnevisionModel, LlavaOnevisionPreprocessor)
