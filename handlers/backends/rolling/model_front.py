"""What the front must know of a model, without its weights: tokenizer, template, preparation, endings, defaults."""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import Vocabulary
from engine.errors import ModelLoadError, RequestRejected, one_line
from engine.sampling_params import MAX_INTEGER, SamplingParams
from handlers.backends.rolling.model_facts import (
    TOKENIZER,
    FactsFinder,
    ModelFacts,
    ModelQuestion,
    load_tokenizer,
    model_facts,
)
from handlers.backends.vision_flags import contradictions
from handlers.model_json import read_object
from handlers.prompts.chat_templates import read_chat_templates
from handlers.prompts.renderer import PromptRenderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from engine.families.base import Preprocessor
    from properties.settings import Settings

log = logging.getLogger(__name__)

IMAGE_SIZES = ((336, 336), (1344, 1344), (1920, 1080))
"""(width, height) of images whose tokens are told to operators."""

_SMALLEST = 1 << 12
"""Pixels of the smallest image that is looked at as one that may fill the context."""

_ASPECTS = 12
"""Half powers of two between the sides of the widest and tallest images that are looked at: 64:1 and 1:64."""

_NO_LIMIT = 100
"""So many images are allowed by who does not want to limit them, as scripts do."""


class ModelFront:
    """What the front knows of the model, without its weights. template: which chat template is used, for people."""

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
        """Tokens of a prompt that one image of that size takes; None where the model does not take it."""
        try:
            layout = None if self.preprocessor is None else self.preprocessor.layout(width, height)
        except RequestRejected:
            return None
        return None if layout is None else len(layout.token_ids)

    def crowded(self, images: int, max_pixels: int, max_model_len: int) -> str | None:
        """What to say where that many images, or one of them, can fill the context; else None.

        Of the shapes that `max_pixels` allows, the smallest that does is named, and the one of the most tokens.
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
        """For answers that must match a grammar."""
        forbidden = () if self.preprocessor is None else tuple(self.preprocessor.forbidden_token_ids)
        return vocabulary_of(self.tokenizer, self.vocab_size, self.eos_token_ids, forbidden)

    @classmethod
    def load(cls, settings: Settings, path: str, find: FactsFinder = model_facts) -> ModelFront:
        """Blocking: a few seconds, nearly all of them another process's. find: who is asked about the model.

        Raises ModelLoadError.
        """
        try:
            return cls._load(settings, path, find)
        except ModelLoadError:
            raise
        except Exception as error:  # a damaged file raises whatever the code stumbles over
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
        log.info("chat template: %s", templates.told())
        try:
            renderer = PromptRenderer(
                tokenizer,
                templates,
                settings.chat_template_content_format,
                image_token if preprocessor is not None else None,
                placeholder=None if written is None else written.placeholder,
                printed=None if written is None else written.printed,
                texts_apart=written is not None and written.texts_apart,
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
            templates.told(),
        )


def _shapes(max_pixels: int) -> list[tuple[int, int]]:
    """(width, height) of images from small ones to those of `max_pixels`, and of those as large, squares first."""
    areas = [max_pixels]
    while areas[-1] > _SMALLEST:
        areas.append(areas[-1] // 2)
    found = []
    for area in reversed(areas):
        for step in sorted(range(-_ASPECTS, _ASPECTS + 1), key=abs):
            width = max(1, int(math.sqrt(area * 2 ** (step / 2))))
            found.append((width, max(1, area // width)))
    return found


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

        family = family_of(facts.kind)
        assert family is not None
        assert family.preprocessor is not None
        return family.preprocessor.from_bytes(facts.preprocessor)
    from engine.loader import load_preprocessor

    return load_preprocessor(question.model_path, question.processor_overrides, question.processor_backend)


def read_generation_config(path: str) -> dict[str, Any]:
    try:
        return read_object(Path(path, "generation_config.json"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"generation_config.json of the model cannot be read: {one_line(error)}"
        ) from error


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


_DEFAULTS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "max_new_tokens": "max_tokens",
}
"""A field of generation_config.json -> of SamplingParams: those that vLLM takes, and typical_p."""

_OF_SAMPLING = frozenset({"temperature", "top_k", "top_p", "min_p", "typical_p"})

_UNREAD = (
    "min_length", "min_new_tokens", "stop_strings", "num_beams", "penalty_alpha", "dola_layers", "top_h",
    "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
    "exponential_decay_length_penalty", "guidance_scale", "watermarking_config", "forced_bos_token_id",
    "forced_eos_token_id", "diversity_penalty", "force_words_ids", "constraints", "max_time", "renormalize_logits",
)  # fmt: skip
"""Fields that change what transformers' `generate` answers, and neither vLLM's server nor this one."""


def read_default_sampling(generation: dict[str, Any]) -> dict[str, float | int]:
    """What generation_config.json says, by the names of SamplingParams, for requests that say nothing of it.

    `do_sample: false` is greedy. What is out of range or without effect here is warned of and left out. The other
    fields are about ends of sequences (see `read_eos_token_ids`), the total length (`max_length`, which as in vLLM is
    the context's), beam search, caches, speed, and the shape of what `generate` returns.
    """
    found: dict[str, float | int] = {}
    for field, name in _DEFAULTS.items():
        value = generation.get(field)
        if value is None or (generation.get("do_sample") is False and name in _OF_SAMPLING):
            continue
        if name in ("top_k", "max_tokens") and isinstance(value, float) and value.is_integer():
            value = int(value)
        if name == "max_tokens" and isinstance(value, int) and value > MAX_INTEGER:
            continue  # more than any context: to its end, which is what None means
        if _allowed(name, value):
            found[name] = value
        else:
            log.warning(
                "generation_config.json: %s = %.40r is not used: no such value is allowed", field, value
            )
    if generation.get("do_sample") is False:
        found["temperature"] = 0.0
    if unread := [field for field in _UNREAD if _changes(field, generation.get(field))]:
        log.warning(
            "generation_config.json: these fields have no effect on this server: %s", ", ".join(unread)
        )
    return found


def _changes(field: str, value: object) -> bool:
    """Token ids and switches are never neutral, but for false; of the others, 0 or 1 is what `generate` does anyway."""
    if field.startswith("forced_") or value is True or field == "max_time":
        return value not in (None, [])
    return value not in (None, 0, 1, [], {})


def _allowed(name: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if name in ("top_k", "max_tokens") and not isinstance(value, int):
        return False
    try:
        SamplingParams(**{name: value}).validate()  # type: ignore[arg-type]
    except ValueError:
        return False
    return True
