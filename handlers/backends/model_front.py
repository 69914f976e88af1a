"""What the front must know of a model, without its weights: tokenizer, template, preparation, endings, defaults."""

from __future__ import annotations

import copy
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from engine.config import Vocabulary
from engine.errors import ModelLoadError
from handlers.backends.model_facts import (
    TOKENIZER,
    FactsFinder,
    ModelFacts,
    ModelQuestion,
    load_tokenizer,
    model_facts,
)
from handlers.backends.vision_flags import contradictions
from handlers.chat_templates import read_chat_templates
from handlers.templates import PromptRenderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from engine.families.base import Preprocessor
    from properties.settings import Settings

log = logging.getLogger(__name__)


class ModelFront:
    """What the front knows of the model, without its weights."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        renderer: PromptRenderer,
        preprocessor: Preprocessor[Any] | None,
        eos_token_ids: tuple[int, ...],
        default_sampling: dict[str, float | int],
        vocab_size: int,
        accelerators: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.renderer = renderer
        self.preprocessor = preprocessor
        self.eos_token_ids = eos_token_ids
        self.default_sampling = default_sampling
        self.vocab_size = vocab_size
        self.accelerators = accelerators

    @property
    def vocabulary(self) -> Vocabulary:
        """For answers that must match a grammar."""
        forbidden = () if self.preprocessor is None else tuple(self.preprocessor.forbidden_token_ids)
        return vocabulary_of(self.tokenizer, self.vocab_size, self.eos_token_ids, forbidden)

    @classmethod
    def load(cls, settings: Settings, path: str, find: FactsFinder = model_facts) -> ModelFront:
        """Blocking: a few seconds, nearly all of them another process's. find: who is asked about the model."""
        question = ModelQuestion(
            path, settings.mm_processor_kwargs, settings.image_processor_backend, settings.trust_remote_code
        )
        with tempfile.TemporaryDirectory(prefix="lmi-") as folder:
            facts = find(question, Path(folder), settings.model_loading_timeout)
            if facts.tokenizer_is_plain:
                from transformers import PreTrainedTokenizerFast

                tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(Path(folder, TOKENIZER))
            else:
                tokenizer = load_tokenizer(path, trust_remote_code=settings.trust_remote_code)
        preprocessor = _preprocessor(facts, question)
        if wrong := contradictions(settings, Path(path), preprocessor):
            raise ModelLoadError("; ".join(wrong))
        if preprocessor is not None and preprocessor.max_images is not None:
            log.info("a prompt of this model holds at most %d images", preprocessor.max_images)
        image_token, own_template, written = settings.image_placeholder_token, None, None
        if preprocessor is not None:
            if image_token is None:
                image_token = str(tokenizer.convert_ids_to_tokens(preprocessor.image_token_id))
            own_template, written = preprocessor.chat_template, preprocessor.written(tokenizer)
        try:
            renderer = PromptRenderer(
                tokenizer,
                read_chat_templates(
                    settings.chat_template, Path(path), tokenizer.chat_template or own_template
                ),
                settings.chat_template_content_format,
                image_token if preprocessor is not None else None,
                placeholder=None if written is None else written.placeholder,
                printed=None if written is None else written.printed,
                adds_special_tokens=preprocessor is None or preprocessor.adds_special_tokens,
                arrange=None if preprocessor is None else preprocessor.arranged,
                around=None if preprocessor is None else preprocessor.around,
                max_images=None if preprocessor is None else preprocessor.max_images,
            )
        except ValueError as error:
            raise ModelLoadError(f"prompts cannot be rendered: {error}") from error
        generation = read_generation_config(path)
        return cls(
            tokenizer,
            renderer,
            preprocessor,
            read_eos_token_ids(generation, facts, tokenizer),
            read_default_sampling(generation),
            facts.vocab_size,
            facts.accelerators,
        )


def vocabulary_of(
    tokenizer: PreTrainedTokenizerFast,
    size: int,
    eos_token_ids: tuple[int, ...],
    forbidden: tuple[int, ...] = (),
) -> Vocabulary:
    """size: of the model's logits. forbidden: tokens that no answer may hold."""
    backend = copy.copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return Vocabulary(
        tokenizer=backend.to_str(),
        tokens=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        size=size,
        eos_token_ids=eos_token_ids,
        forbidden=forbidden,
    )


def _preprocessor(facts: ModelFacts, question: ModelQuestion) -> Preprocessor[Any] | None:
    if not facts.takes_pictures:
        return None
    if facts.preprocessor is not None:
        from engine.families.registry import family_of

        family = family_of(facts.model_type)
        assert family is not None
        assert family.preprocessor is not None
        return family.preprocessor.from_bytes(facts.preprocessor)
    from engine.loader import load_preprocessor

    return load_preprocessor(question.model_path, question.processor_overrides, question.processor_backend)


def read_generation_config(path: str) -> dict[str, Any]:
    try:
        return dict(
            msgspec.json.decode(Path(path, "generation_config.json").read_bytes(), type=dict[str, Any])
        )
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelLoadError("generation_config.json of the model cannot be read") from error


def read_eos_token_ids(generation: dict[str, Any], text_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """generation_config.json decides, as in transformers; else the model's config; else the tokenizer."""
    for source in (
        generation.get("eos_token_id"),
        getattr(text_config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        if source is not None:
            return tuple(source) if isinstance(source, list) else (int(source),)
    return ()


def read_default_sampling(generation: dict[str, Any]) -> dict[str, float | int]:
    """The fields of generation_config.json that we know by the same name; none where it says greedy."""
    names = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
    found = {name: generation[name] for name in names if isinstance(generation.get(name), int | float)}
    if generation.get("do_sample") is False:
        found = {"temperature": 0.0, **{k: v for k, v in found.items() if k == "repetition_penalty"}}
    return found
