"""What a model's files say of its prompts, of the ends of its answers, and of the defaults of requests."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ModelLoadError
from handlers.prompts.generation_config import read_default_sampling, read_eos_token_ids, read_generation_config
from handlers.prompts.renderer import PromptRenderer
from handlers.prompts.tokenizer import vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from engine.config import Vocabulary
    from engine.families.preprocessor import PlaceholderText, Preprocessor
    from handlers.prompts.chat_templates import ChatTemplates
    from properties.settings import Settings

logger = logging.getLogger(__name__)


class ModelText:
    """What one model needs to tokenise prompts and to end answers.

    Attributes:
        tokenizer: The model's.
        renderer: Makes tokens of prompts.
        vocab_size: The size of the model's logits.
        eos_token_ids: The tokens that end an answer.
        default_sampling: See `handlers.backends.base.Capabilities`.
    """

    def __init__(
        self,
        settings: Settings,
        path: Path,
        tokenizer: PreTrainedTokenizerFast,
        templates: ChatTemplates,
        text_config: Any,
        vocab_size: int,
        *,
        image_token: str | None = None,
        written: PlaceholderText | None = None,
        preprocessor: Preprocessor[Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Read the model's files.

        Args:
            settings: The options.
            path: The model's directory.
            tokenizer: The model's.
            templates: Its chat templates.
            text_config: What else may name the tokens that end an answer (`eos_token_id`).
            vocab_size: The size of the model's logits.
            image_token: See `PromptRenderer`, as for `written` and `preprocessor`.
            written: See there.
            preprocessor: See there.
            defaults: What decides the defaults of requests instead of the model's generation_config.json.

        Raises:
            ModelLoadError: The files cannot be used.
        """
        logger.info("chat template: %s", templates.described())
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        try:
            self.renderer = PromptRenderer(
                tokenizer,
                templates,
                settings.chat_template_content_format,
                image_token,
                written=written,
                preprocessor=preprocessor,
            )
        except ValueError as error:
            raise ModelLoadError(f"prompts cannot be rendered: {error}") from error
        generation = read_generation_config(str(path))
        self.eos_token_ids = read_eos_token_ids(generation, text_config, tokenizer)
        self.default_sampling = read_default_sampling(generation if defaults is None else dict(defaults))

    def vocabulary(self, forbidden: tuple[int, ...] = ()) -> Vocabulary:
        """Return what constraints are compiled with. Slow. forbidden: tokens that are never generated."""
        return vocabulary_of(self.tokenizer, self.vocab_size, self.eos_token_ids, forbidden)
