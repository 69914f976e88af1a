"""What the front knows of a model that vLLM serves, and how a request becomes vLLM's input.

Prompts are rendered and tokenised here, not by vLLM, so that what a client types is never obeyed as a special
token and the same request is the same prompt with every backend. vLLM's own renderer places the images.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ModelLoadError
from handlers.backends.mistral_format import mistral_weights_alone
from handlers.backends.vllm.compat import ImageProcessing, image_placeholder
from handlers.backends.vllm.prompts.places import (
    ImagePlaceholders,
    image_placeholders,
    rows_of_mistral,
)
from handlers.prompts.chat_templates import read_chat_templates
from handlers.prompts.generation_config import (
    read_default_sampling,
    read_eos_token_ids,
    read_generation_config,
)
from handlers.prompts.renderer import PromptRenderer
from handlers.request import ImagePart, MediaPart

if TYPE_CHECKING:
    from handlers.backends.vllm.compat import Vllm
    from properties.settings import Settings

logger = logging.getLogger(__name__)


class VllmFront:
    """Tokenizer, template, endings and defaults of one model. images: whether it takes images."""

    def __init__(self, settings: Settings, path: str, tokenizer: Any, vllm: Vllm, engine: Any) -> None:
        """Blocking: reads the model's files. Raises ModelLoadError."""
        config = engine.model_config
        text_config = config.hf_text_config
        self.tokenizer = tokenizer
        self.images = bool(config.is_multimodal_model) and ImageProcessing(engine).takes_images
        templates = read_chat_templates(settings.chat_template, Path(path), tokenizer.chat_template)
        logger.info("chat template: %s", templates.told())
        self.places: ImagePlaceholders | None = None
        if self.images:
            placeholder, inserts = image_placeholder(vllm, config)
            self.places = image_placeholders(
                tokenizer,
                placeholder,
                _image_token_id(config.hf_config),
                settings.image_placeholder_token,
                inserts=inserts,
                printed="\x00".join(templates.all),
            )
            if mistral_weights_alone(Path(path)):
                written = rows_of_mistral(ImageProcessing(engine).hf_processor)
                self.places = replace(self.places, written=written)
        try:
            self.renderer = PromptRenderer(
                tokenizer,
                templates,
                settings.chat_template_content_format,
                None if self.places is None else self.places.token,
                placeholder=None if self.places is None else self.places.placeholder,
            )
        except ValueError as error:
            raise ModelLoadError(f"prompts cannot be rendered: {error}") from error
        self.eos_token_ids = read_eos_token_ids(read_generation_config(path), text_config, tokenizer)
        self.default_sampling = read_default_sampling(generation_defaults(config, path))
        self.vocab_size = int(config.get_vocab_size())

    def exchanged(self, token_ids: list[int], parts: Sequence[MediaPart]) -> list[int]:
        """A rendered prompt with these images as vLLM wants it: see `places`."""
        if self.places is None or not parts:
            return token_ids
        sizes = [
            (part.loaded.image.width, part.loaded.image.height)
            for part in parts
            if isinstance(part, ImagePart) and part.loaded is not None
        ]
        return self.places.exchanged(token_ids, self.renderer.image_token_id, sizes)


def generation_defaults(config: Any, path: str) -> dict[str, Any]:
    """The generation_config.json that requests get their defaults from, as vLLM's own options of that name say."""
    source = config.generation_config
    own = {} if source == "vllm" else read_generation_config(path if source == "auto" else source)
    own.update(config.override_generation_config)
    return own


def _image_token_id(config: Any) -> int | None:
    for place in (config, getattr(config, "vision_config", None)):  # the latter in Mistral's own format
        for name in ("image_token_id", "image_token_index"):
            value = getattr(place, name, None)
            if isinstance(value, int):
                return value
    return None
