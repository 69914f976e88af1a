"""Llava's pictures: each is resized to the tower's one size, and so becomes the same number of tokens."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import msgspec

from engine.errors import ModelLoadError
from engine.families.pixels import DirectPixels, PixelPipeline, ProcessorBackend, Recipe, processor_options
from engine.families.preprocessor import PreparedPicture, Preprocessor

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PretrainedConfig

TOWERS = ("clip_vision_model", "siglip_vision_model")


class _Facts(msgspec.Struct):
    image_token_id: int
    num_tokens: int
    fingerprint: bytes
    recipe: Recipe


class LlavaPreprocessor(Preprocessor):
    def __init__(
        self, image_token_id: int, num_tokens: int, fingerprint: bytes, pixels: PixelPipeline | DirectPixels
    ) -> None:
        self.image_token_id = image_token_id
        self.fingerprint = fingerprint
        self._token_ids = [image_token_id] * num_tokens
        self._pixels = pixels

    @classmethod
    def from_model(
        cls, model_path: str, overrides: dict[str, Any] | None = None, backend: ProcessorBackend = "auto"
    ) -> LlavaPreprocessor:
        from transformers import AutoConfig, AutoImageProcessor

        config = AutoConfig.from_pretrained(model_path)
        load: Any = AutoImageProcessor.from_pretrained
        processor = load(model_path, **{**processor_options(backend), **(overrides or {})})
        try:
            pixels = PixelPipeline(processor, backend)
        except ValueError as error:
            raise ModelLoadError(str(error)) from error
        settings = json.dumps([pixels.backend, processor.to_dict()], sort_keys=True, default=str)
        fingerprint = hashlib.blake2b(settings.encode(), digest_size=8).digest()
        return cls(int(config.image_token_id), num_image_tokens(config), fingerprint, pixels)

    def prepare(self, image: Image) -> PreparedPicture:
        return PreparedPicture(self._token_ids, {"pixel_values": self._pixels(image)})

    def facts(self) -> bytes | None:
        recipe = self._pixels.recipe
        if recipe is None:
            return None
        return msgspec.msgpack.encode(
            _Facts(self.image_token_id, len(self._token_ids), self.fingerprint, recipe)
        )

    @classmethod
    def from_facts(cls, facts: bytes) -> LlavaPreprocessor:
        known = msgspec.msgpack.decode(facts, type=_Facts)
        return cls(known.image_token_id, known.num_tokens, known.fingerprint, DirectPixels(known.recipe))


def num_image_tokens(config: PretrainedConfig) -> int:
    """How many rows the tower gives for one picture: its patches, and CLIP's class token unless it is cut off."""
    vision = config.vision_config
    if vision.model_type not in TOWERS:
        raise ModelLoadError(
            f"vision tower {vision.model_type!r} of this Llava is not supported; supported: {', '.join(TOWERS)}"
        )
    rows = (vision.image_size // vision.patch_size) ** 2 + (vision.model_type == "clip_vision_model")
    return int(rows - (config.vision_feature_select_strategy == "default"))
