"""What the front end must know of a model, without its weights: tokenizer, template, preparation, endings, defaults."""

from __future__ import annotations

import logging
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import Vocabulary
from engine.errors import ModelLoadError, RequestRejected, one_line
from handlers.backends.rolling.model_facts import (
    TOKENIZER,
    FactsFinder,
    ModelFacts,
    ModelQuestion,
    model_facts,
)
from handlers.backends.vision_flags import contradictions
from handlers.prompts.chat_templates import read_chat_templates
from handlers.prompts.generation_config import (
    read_default_sampling,
    read_eos_token_ids,
    read_generation_config,
)
from handlers.prompts.renderer import PromptRenderer
from handlers.prompts.tokenizer import load_tokenizer, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from engine.families.base import Preprocessor
    from properties.settings import Settings

log = logging.getLogger(__name__)

IMAGE_SIZES = ((336, 336), (1344, 1344), (1920, 1080))
"""The (width, height) of images whose number of tokens is reported to operators."""

_SMALLEST = 1 << 12
"""Pixels of the smallest image that is examined for whether it fills the context."""

_ASPECTS = 12
"""Half powers of two between the sides of the widest and tallest images that are examined: 64:1 and 1:64."""

_NO_LIMIT = 100
"""A limit as high as this means that images are not limited, as in scripts."""


class ModelFront:
    """What the front end knows of the model; `template` describes the chat template that is used."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        renderer: PromptRenderer,
        preprocessor: Preprocessor[Any] | None,
        eos_token_ids: tuple[int, ...],
        default_sampling: dict[str, float | int],
        vocab_size: int,
        accelerators: int,
        template: str,
    ) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.renderer = renderer
        self.preprocessor = preprocessor
        self.eos_token_ids = eos_token_ids
        self.default_sampling = default_sampling
        self.vocab_size = vocab_size
        self.accelerators = accelerators

    def image_tokens(self, width: int, height: int) -> int | None:
        """Return the tokens that one image of that size takes in a prompt; None if the model does not accept it."""
        try:
            layout = None if self.preprocessor is None else self.preprocessor.layout(width, height)
        except RequestRejected:
            return None
        return None if layout is None else len(layout.token_ids)

    def crowded(self, images: int, max_pixels: int, max_model_len: int) -> str | None:
        """Return a message if that many images, or one of them, can fill the context; else None.

        Of the shapes that `max_pixels` allows, it names the smallest that fills the context, and the one of the most
        tokens.
        """
        counts = {size: self.image_tokens(*size) or 0 for size in _shapes(max_pixels)}
        most = max(counts, key=lambda size: counts[size])
        images = 1 if images >= _NO_LIMIT or counts[most] >= max_model_len else images
        first = next((size for size, count in counts.items() if images * count >= max_model_len), None)
        if first is None:
            return None
        told, verb = "an image", "takes"
        if images > 1:
            told, verb = f"{images} images (option.limit_mm_per_prompt)", "take"
        if len({count for count in counts.values() if count}) > 1:
            told += f" of {first[0]}x{first[1]} pixels"
        told += f" {verb} {images * counts[first]} tokens"
        if counts[most] > counts[first]:
            told += (
                f" (of {most[0]}x{most[1]}, which option.max_image_pixels allows, {images * counts[most]})"
            )
        return (
            f"{told}, and the context holds {max_model_len}: such requests are refused; raise option.max_model_len, or "
            "lower the number or the size of images"
        )

    @property
    def vocabulary(self) -> Vocabulary:
        """Return the vocabulary, for answers that must match a grammar."""
        forbidden = () if self.preprocessor is None else tuple(self.preprocessor.forbidden_token_ids)
        return vocabulary_of(self.tokenizer, self.vocab_size, self.eos_token_ids, forbidden)

    @classmethod
    def load(cls, settings: Settings, path: str, find: FactsFinder = model_facts) -> ModelFront:
        """Read the model's files. Blocking: a few seconds, nearly all of them in another process.

        Args:
            settings: The options.
            path: The model's directory.
            find: Finds out what transformers knows about the model.

        Raises:
            ModelLoadError: The model cannot be served.
        """
        try:
            return cls._load(settings, path, find)
        except ModelLoadError:
            raise
        except Exception as error:  # a damaged file can raise anything
            raise ModelLoadError(f"the model's files cannot be used: {one_line(error)}") from error

    @classmethod
    def _load(cls, settings: Settings, path: str, find: FactsFinder) -> ModelFront:
        degree = settings.tensor_parallel_degree
        question = ModelQuestion(
            path,
            settings.mm_processor_kwargs,
            settings.image_processor_backend,
            settings.trust_remote_code,
            1 if degree == "max" else degree,
        )
        with tempfile.TemporaryDirectory(prefix="lmi-") as folder:
            facts = find(question, Path(folder), settings.model_loading_timeout)
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
        if wrong := contradictions(settings, Path(path), preprocessor):
            raise ModelLoadError("; ".join(wrong))
        if preprocessor is not None and preprocessor.max_images is not None:
            log.info("a prompt of this model holds at most %d images", preprocessor.max_images)
        image_token, own_template, written = settings.image_placeholder_token, None, None
        if preprocessor is not None:
            if image_token is None:
                image_token = str(tokenizer.convert_ids_to_tokens(preprocessor.image_token_id))
            own_template, written = preprocessor.chat_template, preprocessor.written(tokenizer)
        otherwise = tokenizer.chat_template or own_template
        templates = read_chat_templates(settings.chat_template, Path(path), otherwise)
        log.info("chat template: %s", templates.described())
        try:
            renderer = PromptRenderer(
                tokenizer,
                templates,
                settings.chat_template_content_format,
                image_token if preprocessor is not None else None,
                written=written,
                preprocessor=preprocessor,
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
            templates.described(),
        )


def _shapes(max_pixels: int) -> list[tuple[int, int]]:
    """Return the (width, height) of images from small ones to those of `max_pixels`, squares first in each size."""
    areas = [max_pixels]
    while areas[-1] > _SMALLEST:
        areas.append(areas[-1] // 2)
    found = []
    for area in reversed(areas):
        for step in sorted(range(-_ASPECTS, _ASPECTS + 1), key=abs):
            width = max(1, int(math.sqrt(area * 2 ** (step / 2))))
            found.append((width, max(1, area // width)))
    return found


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
