"""Models with a Pixtral tower: Pixtral (a Llava with that tower) and Mistral 3.

Images keep their aspect: each becomes as many rows of features as it has, with a token of its own after each row.
Mistral 3 merges squares of features into one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import ModelLoadError, RequestRejected
from engine.families.anyres import Size
from engine.families.base import Arrays, Facts, Family, FamilyModel, Layout, ModelFiles, Preprocessor
from engine.families.pixels import value_recipe
from engine.families.text import check_text

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PretrainedConfig


class PixtralFacts(Facts, kw_only=True):
    """longest: (height, width) that no image exceeds. unit: edge, in pixels, of what becomes one token."""

    break_token_id: int
    end_token_id: int
    longest: Size
    unit: int


class PixtralPreprocessor(Preprocessor[PixtralFacts]):
    facts_type = PixtralFacts
    tensor_names = ("pixel_values", "image_sizes")
    probes = ((40, 64), (129, 77), (1301, 300), (301, 1700))
    # there is no telling where rows end that come without their image
    takes_embeddings = False

    @classmethod
    def read(cls, model: ModelFiles) -> PixtralFacts:
        size = {key: int(edge) for key, edge in dict(model.processor.size).items() if edge}
        longest = size.get("longest_edge", 0)
        break_token_id, end_token_id = _row_tokens(model)
        return PixtralFacts(
            image_token_id=int(model.config.image_token_id),
            recipe=value_recipe(model.processor, model.backend),
            break_token_id=break_token_id,
            end_token_id=end_token_id,
            longest=(size.get("height", longest), size.get("width", longest)),
            unit=_unit(model.config),
        )

    @property
    def forbidden_token_ids(self) -> Sequence[int]:
        return [self.facts.image_token_id, self.facts.break_token_id, self.facts.end_token_id]

    def layout(self, width: int, height: int, variant: int = 0) -> Layout:
        rows, columns = self._grid(width, height)
        facts = self.facts
        ids = ([facts.image_token_id] * columns + [facts.break_token_id]) * rows
        ids[-1] = facts.end_token_id
        return Layout(ids, ([True] * columns + [False]) * rows)

    def direct(self, image: Image, variant: int = 0) -> Arrays:
        recipe = self.facts.recipe
        assert recipe is not None
        height, width = (tokens * self.facts.unit for tokens in self._grid(*image.size))
        return {
            "pixel_values": recipe.values(recipe.resized(image, (width, height))),
            "image_sizes": np.array([height, width]),
        }

    def reference(self, image: Image, variant: int = 0) -> Arrays:
        # whole tokens: what the joint processor tells the image processor, whatever that one's own patch_size is
        out = self._processor(images=image, patch_size=self.facts.unit, return_tensors="np")
        return {name: np.asarray(out[name][0]) for name in self.tensor_names}

    def _grid(self, width: int, height: int) -> Size:
        """Rows and columns of tokens. Raises RequestRejected for an image of which nothing would be left.

        An image that is too large is shrunk, another one is not enlarged but for what its
        last row and column lack; the roundings are those of transformers' `get_resize_output_image_size`."""
        ratio = max(height / self.facts.longest[0], width / self.facts.longest[1])
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        if min(height, width) < 1:
            raise RequestRejected(
                "the picture is too thin: shrunk to what the model takes, less than one pixel of it is left"
            )
        return (height - 1) // self.facts.unit + 1, (width - 1) // self.facts.unit + 1


class PixtralModel(FamilyModel):
    # the tower's attention takes memory by the square of all features that it sees at once
    encode_batch = 1

    @classmethod
    def check(cls, config: PretrainedConfig) -> None:
        check_text(config.text_config)
        if getattr(config, "vision_feature_select_strategy", "full") != "full":
            raise ModelLoadError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} of config.json would drop a "
                "feature of each image, for a Pixtral tower has no class token; set 'full'"
            )

    def encode(self, pictures: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        return [self._encoded(picture) for picture in pictures]

    def _encoded(self, picture: dict[str, torch.Tensor]) -> torch.Tensor:
        features = self.model.model.get_image_features(
            pixel_values=picture["pixel_values"][None].to(self.model.dtype),
            image_sizes=[tuple(picture["image_sizes"].tolist())],
            vision_feature_layer=self.model.config.vision_feature_layer,
            return_dict=True,
        )
        rows: torch.Tensor = features.pooler_output[0]
        return rows


def _unit(config: PretrainedConfig) -> int:
    return int(config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1))


def _row_tokens(model: ModelFiles) -> tuple[int, int]:
    """The tokens behind a row and behind the last. Raises ModelLoadError where the tokenizer has none."""
    file = Path(model.path, "processor_config.json")
    named: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
    names = named.get("image_break_token", "[IMG_BREAK]"), named.get("image_end_token", "[IMG_END]")
    known = model.tokenizer.get_vocab()
    if missing := [name for name in names if name not in known]:
        raise ModelLoadError(f"the tokenizer has no token {missing[0]!r}, which stands after rows of images")
    return known[names[0]], known[names[1]]


FAMILY = Family(PixtralModel, PixtralPreprocessor)
