"""Llava 1.5: a CLIP or SigLIP tower, a two-layer projector, and a Llama, Mistral or Qwen2 decoder.

Each image is resized to the tower's one size, and so becomes the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.errors import ModelLoadError
from engine.families.base import Arrays, Facts, Family, FamilyModel, Layout, ModelFiles, Preprocessor
from engine.families.pixels import DirectPixels, recipe_of
from engine.families.text import check_text

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PretrainedConfig

TOWERS = ("clip_vision_model", "siglip_vision_model")


class LlavaFacts(Facts, kw_only=True):
    num_tokens: int


class LlavaPreprocessor(Preprocessor[LlavaFacts]):
    facts_type = LlavaFacts

    @classmethod
    def read(cls, model: ModelFiles) -> LlavaFacts:
        return LlavaFacts(
            image_token_id=int(model.config.image_token_id),
            recipe=recipe_of(model.processor, model.backend),
            num_tokens=num_image_tokens(model.config),
        )

    def layout(self, width: int, height: int, variant: int = 0) -> Layout:
        return Layout([self.facts.image_token_id] * self.facts.num_tokens)

    def direct(self, image: Image, variant: int = 0) -> Arrays:
        assert self.facts.recipe is not None
        return {"pixel_values": DirectPixels(self.facts.recipe)(image)}


class LlavaModel(FamilyModel):
    @classmethod
    def check(cls, config: PretrainedConfig) -> None:
        num_image_tokens(config)
        check_text(config.text_config)

    def encode(self, pictures: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        import torch

        pixels = torch.stack([picture["pixel_values"] for picture in pictures])
        features = self.model.model.get_image_features(
            pixel_values=pixels.to(self.model.dtype), return_dict=True
        )
        return list(features.pooler_output)


def num_image_tokens(config: PretrainedConfig) -> int:
    """How many rows the tower gives for one image: its patches, and CLIP's class token unless it is cut off."""
    vision = config.vision_config
    if vision.model_type not in TOWERS:
        raise ModelLoadError(
            f"vision tower {vision.model_type!r} of this Llava is not supported; supported: {', '.join(TOWERS)}"
        )
    rows = (vision.image_size // vision.patch_size) ** 2 + (vision.model_type == "clip_vision_model")
    return int(rows - (config.vision_feature_select_strategy == "default"))


FAMILY = Family(LlavaModel, LlavaPreprocessor)
