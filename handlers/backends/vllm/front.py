"""What the front knows of a model that vLLM serves, and how a request becomes vLLM's input.

Prompts are rendered and tokenised here, not by vLLM, so that what a client types is never obeyed as a special
token and the same request is the same prompt with every backend. vLLM's own renderer places the pictures.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from engine.errors import ModelLoadError
from handlers.backends.model_front import (
    read_chat_template,
    read_default_sampling,
    read_eos_token_ids,
    read_generation_config,
)
from handlers.templates import PromptRenderer

if TYPE_CHECKING:
    from handlers.backends.vllm.compat import Vllm
    from properties.settings import Settings

logger = logging.getLogger(__name__)


class VllmFront:
    """Tokenizer, template, endings and defaults of one model. images: whether it takes pictures."""

    def __init__(self, settings: Settings, path: str, tokenizer: Any, vllm: Vllm, engine: Any) -> None:
        """Blocking: reads the model's files. Raises ModelLoadError."""
        config = engine.model_config
        text_config = config.hf_text_config
        self.tokenizer = tokenizer
        self.images = bool(config.is_multimodal_model) and "image" in _modalities(engine)
        image_token, placeholder = None, None
        if self.images:
            image_token, placeholder = picture_tokens(
                tokenizer,
                _placeholder(vllm, config),
                _image_token_id(config.hf_config),
                settings.image_placeholder_token,
            )
        try:
            self.renderer = PromptRenderer(
                tokenizer,
                read_chat_template(settings.chat_template, path) or tokenizer.chat_template,
                settings.chat_template_content_format,
                image_token,
                placeholder=placeholder,
            )
        except ValueError as error:
            raise ModelLoadError(f"prompts cannot be rendered: {error}") from error
        generation = read_generation_config(path)
        self.eos_token_ids = read_eos_token_ids(generation, text_config, tokenizer)
        self.default_sampling = read_default_sampling(generation)
        self.vocab_size = int(config.get_vocab_size())
        self._texts: dict[int, str] = {}

    def token_text(self, token_id: int) -> str:
        """What a single token looks like, remembered."""
        text = self._texts.get(token_id)
        if text is None:
            text = str(self.tokenizer.backend_tokenizer.decode([token_id], skip_special_tokens=False))
            self._texts[token_id] = text
        return text


def picture_tokens(
    tokenizer: Any, placeholder: str | None, image_token_id: int | None, wanted: str | None
) -> tuple[str, str]:
    """(the one token that stands for a picture in a prompt, the text around it that the model wants).

    placeholder: what vLLM writes for a picture, where it says. image_token_id: from the model's config.
    wanted: the operator's own. Raises ModelLoadError when no single token can be told.
    """

    def encoded(text: str) -> list[int]:
        ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    if wanted is not None:
        return wanted, wanted
    if placeholder is not None:
        ids = encoded(placeholder)
        if len(ids) == 1:
            return placeholder, placeholder
        if image_token_id in ids:
            return str(tokenizer.convert_ids_to_tokens(image_token_id)), placeholder
    if image_token_id is not None:
        token = tokenizer.convert_ids_to_tokens(image_token_id)
        if token is not None and encoded(token) == [image_token_id]:
            return str(token), str(token)
    raise ModelLoadError(
        "it cannot be told which token stands for a picture in this model's prompts: "
        "set option.image_placeholder_token"
    )


def _modalities(engine: Any) -> Any:
    return engine.renderer.get_mm_processor().info.supported_mm_limits


def _placeholder(vllm: Vllm, config: Any) -> str | None:
    try:
        text = vllm.model_class(config).get_placeholder_str("image", 1)
    except (AttributeError, ValueError, NotImplementedError) as error:
        logger.debug("vLLM names no placeholder: %s", error)
        return None
    return None if text is None else str(text)


def _image_token_id(config: Any) -> int | None:
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None
