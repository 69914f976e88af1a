"""Llava 1.5: a CLIP or SigLIP tower, a two-layer projector, and a Llama, Mistral or Qwen2 decoder.

Each image is resized to the tower's size, and so becomes the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.errors import ModelLoadError
from engine.families.base import Family, FamilyModel
from engine.families.preprocessor import FixedMetadata, FixedPreprocessor, ModelFiles
from engine.weights import LAST_NORM, POOLING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOWERS = ("clip_vision_model", "siglip_vision_model")


class LlavaPreprocessor(FixedPreprocessor[FixedMetadata]):
    metadata_type = FixedMetadata
    takes_features = True

    @classmethod
    def read(cls, model: ModelFiles) -> FixedMetadata:
        return FixedMetadata(
            image_token_id=model.image_token_id, recipe=model.whole_recipe, num_tokens=num_image_tokens(model.config)
        )


class LlavaModel(FamilyModel):
    @classmethod
    def unused_weights(cls, config: PretrainedConfig) -> Sequence[str]:
        """Return what the tower lacks where it was cut after the layer whose output is used."""
        return (POOLING, LAST_NORM) if config.vision_feature_layer == -2 else (POOLING,)

    @classmethod
    def check(cls, config: PretrainedConfig) -> None:
        num_image_tokens(config)
        super().check(config)


def num_image_tokens(config: PretrainedConfig) -> int:
    """Count the rows of the tower for an image: its patches, and CLIP's class token unless it is cut off."""
    vision = config.vision_config
    if vision.model_type not in TOWERS:
        raise ModelLoadError(
            f"vision tower {vision.model_type!r} of this Llava is not supported; supported: {', '.join(TOWERS)}"
        )
    rows = (vision.image_size // vision.patch_size) ** 2 + (vision.model_type == "clip_vision_model")
    return int(rows - (config.vision_feature_select_strategy == "default"))


FAMILY = Family(LlavaModel, LlavaPreprocessor)
