"""What the front end must know of a model, without its weights: tokenizer, template, preparation, endings, defaults."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import Vocabulary
from engine.errors import ModelLoadError, one_line
from handlers.backends.image_options import contradictions
from handlers.backends.model_text import ModelText
from handlers.backends.rolling.model_facts import (
    TOKENIZER,
    Asking,
    ModelFacts,
    ModelQuestion,
    ask_new_process,
    model_facts,
)
from handlers.prompts.chat_templates import read_chat_templates
from handlers.prompts.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from engine.families.preprocessor import Preprocessor
    from properties.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFront:
    """What the front end knows of the model.

    Attributes:
        text: What its files say of prompts and answers.
        preprocessor: What prepares its images; None for a model without images.
        accelerators: How many devices torch sees.
        contradictions: See `handlers.backends.image_options.contradictions`: the model must not be served with any.
    """

    text: ModelText
    preprocessor: Preprocessor[Any] | None
    accelerators: int
    contradictions: Sequence[str] = ()

    @property
    def vocabulary(self) -> Vocabulary:
        """Return the vocabulary, for answers that must match a grammar."""
        forbidden = () if self.preprocessor is None else tuple(self.preprocessor.forbidden_token_ids)
        return self.text.vocabulary(forbidden)

    @classmethod
    def load(cls, settings: Settings, path: str, ask: Asking = ask_new_process) -> ModelFront:
        """Read the model's files. Blocking: a few seconds, nearly all of them in another process.

        Args:
            settings: The options.
            path: The model's directory.
            ask: Asks another process what transformers knows about the model.

        Raises:
            ModelLoadError: The model cannot be served.
        """
        try:
            return cls._load(settings, path, ask)
        except ModelLoadError:
            raise
        except Exception as error:  # a damaged file can raise anything
            raise ModelLoadError(f"the model's files cannot be used: {one_line(error)}") from error

    @classmethod
    def _load(cls, settings: Settings, path: str, ask: Asking) -> ModelFront:
        degree = settings.tensor_parallel_degree
        question = ModelQuestion(
            path,
            settings.mm_processor_kwargs,
            settings.image_processor_backend,
            settings.trust_remote_code,
            1 if degree == "max" else degree,
        )
        with tempfile.TemporaryDirectory(prefix="lmi-") as folder:
            facts = model_facts(question, Path(folder), settings.model_loading_timeout, ask)
            if facts.tokenizer_is_plain:
                from transformers import PreTrainedTokenizerFast

                tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(Path(folder, TOKENIZER))
            else:
                tokenizer = load_tokenizer(path, trust_remote_code=settings.trust_remote_code)
        asked, positions = settings.max_model_len, facts.positions
        if asked is not None and positions is not None and asked > positions:
            raise ModelLoadError(
                f"option.max_model_len = {asked} is more than the model's own {positions} positions; lower it"
            )
        preprocessor = _preprocessor(facts, question)
        if preprocessor is not None and preprocessor.max_images is not None:
            log.info("a prompt of this model holds at most %d images", preprocessor.max_images)
        image_token, own_template, written = settings.image_placeholder_token, None, None
        if preprocessor is not None:
            if image_token is None:
                image_token = str(tokenizer.convert_ids_to_tokens(preprocessor.image_token_id))
            own_template, written = preprocessor.chat_template, preprocessor.written(tokenizer)
        otherwise = tokenizer.chat_template or own_template
        text = ModelText(
            settings,
            Path(path),
            tokenizer,
            read_chat_templates(settings.chat_template, Path(path), otherwise),
            facts,
            facts.vocab_size,
            image_token=image_token if preprocessor is not None else None,
            written=written,
            preprocessor=preprocessor,
        )
        return cls(text, preprocessor, facts.accelerators, contradictions(settings, Path(path), preprocessor))


def _preprocessor(facts: ModelFacts, question: ModelQuestion) -> Preprocessor[Any] | None:
    if not facts.takes_images:
        return None
    if facts.preprocessor is not None:
        from engine.families.registry import family_of

        family = family_of(facts.kind)
        assert family is not None
        assert family.preprocessor is not None
        return family.preprocessor.from_bytes(facts.preprocessor)
    from engine.loader import load_preprocessor

    return load_preprocessor(question.model_path, question.processor_overrides, question.processor_backend)
