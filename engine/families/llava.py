"""Llava 1.5: a CLIP or SigLIP tower, a two-layer projector, and a Llama, Mistral or Qwen2 decoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoImageProcessor, PretrainedConfig

from engine.errors import ModelLoadError
from engine.families.base import Family, PreparedPicture, Preprocessor
from engine.families.pixels import PixelPipeline, ProcessorBackend, processor_options

if TYPE_CHECKING:
    from PIL.Image import Image

TOWERS = ("clip_vision_model", "siglip_vision_model")


class LlavaPreprocessor(Preprocessor):
    """Every picture is resized to the tower's one size, and so becomes the same number of tokens."""

    def __init__(
        self,
        model_path: str,
        *,
        overrides: dict[str, Any] | None = None,
        backend: ProcessorBackend = "auto",
    ) -> None:
        config = AutoConfig.from_pretrained(model_path)
        load: Any = AutoImageProcessor.from_pretrained
        processor = load(model_path, **{**processor_options(backend), **(overrides or {})})
        try:
            self._pipeline = PixelPipeline(processor, backend)
        except ValueError as error:
            raise ModelLoadError(str(error)) from error
        self.image_token_id = int(config.image_token_id)
        self._token_ids = [self.image_token_id] * num_image_tokens(config)
        settings = json.dumps([self._pipeline.backend, processor.to_dict()], sort_keys=True, default=str)
        self.fingerprint = hashlib.blake2b(settings.encode(), digest_size=8).digest()

    def prepare(self, image: Image) -> PreparedPicture:
        return PreparedPicture(self._token_ids, {"pixel_values": self._pipeline(image)})


class LlavaFamily(Family):
    @property
    def decoder(self) -> torch.nn.Module:
        decoder: torch.nn.Module = self.model.model.language_model
        return decoder

    @property
    def head(self) -> torch.nn.Module:
        head: torch.nn.Module = self.model.lm_head
        return head

    @property
    def text_config(self) -> PretrainedConfig:
        config: PretrainedConfig = self.model.config.text_config
        return config

    def encode(self, pictures: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        pixels = torch.stack([picture["pixel_values"] for picture in pictures])
        features = self.model.model.get_image_features(
            pixel_values=pixels.to(self.model.dtype), return_dict=True
        )
        return list(features.pooler_output)


def num_image_tokens(config: PretrainedConfig) -> int:
    """How many rows the tower gives for one picture: its patches, and CLIP's class token unless it is cut off."""
    vision = config.vision_config
    if vision.model_type not in TOWERS:
        raise ModelLoadError(
            f"vision tower {vision.model_type!r} of this Llava is not supported; supported: {', '.join(TOWERS)}"
        )
    rows = (vision.image_size // vision.patch_size) ** 2 + (vision.model_type == "clip_vision_model")
    return int(rows - (config.vision_feature_select_strategy == "default"))
