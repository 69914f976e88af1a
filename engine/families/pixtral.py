"""Models with a Pixtral tower: Pixtral (a Llava with that tower) and Mistral 3.

Images keep their aspect. Each becomes rows of features, and a special token ends each row. Mistral 3 merges
squares of features into one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import ModelLoadError, RequestRejected
from engine.families.base import Family, FamilyModel
from engine.families.preprocessor import Arrays, Layout, Metadata, ModelFiles, Preprocessor
from engine.families.tiles import Size

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PretrainedConfig


class PixtralMetadata(Metadata, kw_only=True):
    """Metadata of a model with a Pixtral tower.

    Attributes:
        break_token_id: Token after each row but the last.
        end_token_id: Token after the last row.
        longest: Greatest (height, width) of an image.
        unit: Edge, in pixels, of the square that becomes one token.
    """

    break_token_id: int
    end_token_id: int
    longest: Size
    unit: int


class PixtralPreprocessor(Preprocessor[PixtralMetadata]):
    metadata_type = PixtralMetadata
    tensor_names = ("pixel_values", "image_sizes")
    probes = ((40, 64), (129, 77), (1301, 300), (301, 1700))
    # Without the image it is unknown where rows end.
    takes_embeddings = False

    @classmethod
    def read(cls, model: ModelFiles) -> PixtralMetadata:
        size = model.size
        longest = size.get("longest_edge", 0)
        break_token_id, end_token_id = _row_tokens(model)
        return PixtralMetadata(
            image_token_id=model.image_token_id,
            recipe=model.recipe,
            break_token_id=break_token_id,
            end_token_id=end_token_id,
            longest=(size.get("height", longest), size.get("width", longest)),
            unit=_unit(model.config),
        )

    @property
    def forbidden_token_ids(self) -> Sequence[int]:
        return [self.metadata.image_token_id, self.metadata.break_token_id, self.metadata.end_token_id]

    def layout(self, width: int, height: int, variant: int = 0) -> Layout:
        rows, columns = self._grid(width, height)
        metadata = self.metadata
        ids = ([metadata.image_token_id] * columns + [metadata.break_token_id]) * rows
        ids[-1] = metadata.end_token_id
        return Layout.marked(ids, metadata.image_token_id)

    def direct(self, image: Image, variant: int = 0) -> Arrays:
        recipe = self.recipe
        height, width = (tokens * self.metadata.unit for tokens in self._grid(*image.size))
        return {
            "pixel_values": recipe.values(recipe.resized(image, (width, height))),
            "image_sizes": np.array([height, width]),
        }

    def reference(self, image: Image, variant: int = 0) -> Arrays:
        # As in the joint processor, patch_size is the size of a whole token, not the image processor's own.
        out = self._processor(images=image, patch_size=self.metadata.unit, return_tensors="np")
        return {name: np.asarray(out[name][0]) for name in self.tensor_names}

    def _grid(self, width: int, height: int) -> Size:
        """Rows and columns of tokens.

        An image that is too large is shrunk. Others are only enlarged to complete their last row and column.
        It rounds as transformers' `get_resize_output_image_size` does.

        Raises:
            RequestRejected: Nothing would be left of the image.
        """
        ratio = max(height / self.metadata.longest[0], width / self.metadata.longest[1])
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        if min(height, width) < 1:
            raise RequestRejected(
                "the image is too thin: shrunk to the size that the model takes, less than one pixel of it is left"
            )
        return (height - 1) // self.metadata.unit + 1, (width - 1) // self.metadata.unit + 1


class PixtralModel(FamilyModel):
    # The memory of the tower's attention grows with the square of the number of features.
    encode_batch = 1

    @classmethod
    def check(cls, config: PretrainedConfig) -> None:
        super().check(config)
        if getattr(config, "vision_feature_select_strategy", "full") != "full":
            raise ModelLoadError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} of config.json would drop a "
                "feature of each image, because a Pixtral tower has no class token; set 'full'"
            )

    def encode(self, images: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        return [
            self.features(
                pixel_values=image["pixel_values"][None].to(self.model.dtype),
                image_sizes=[tuple(image["image_sizes"].tolist())],
                vision_feature_layer=self.model.config.vision_feature_layer,
            )[0]
            for image in images
        ]


def _unit(config: PretrainedConfig) -> int:
    return int(config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1))


def _row_tokens(model: ModelFiles) -> tuple[int, int]:
    """Return the token after a row, and the one after the last row.

    Raises:
        ModelLoadError: The tokenizer has no such token.
    """
    file = Path(model.path, "processor_config.json")
    named: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
    names = named.get("image_break_token", "[IMG_BREAK]"), named.get("image_end_token", "[IMG_END]")
    known = model.tokenizer.get_vocab()
    if missing := [name for name in names if name not in known]:
        raise ModelLoadError(f"the tokenizer has no token {missing[0]!r}, which stands after rows of images")
    return known[names[0]], known[names[1]]


FAMILY = Family(PixtralModel, PixtralPreprocessor)
