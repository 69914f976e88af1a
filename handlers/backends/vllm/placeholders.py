"""Finds what stands for an image in the prompts of a model.

Prompts are rendered with one token for each image. If the model's processor wants several tokens there, or none, that
token is a stand-in, which is replaced before vLLM places the images.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ModelLoadError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImagePlaceholders:
    """What stands for an image.

    Attributes:
        token: The token of a rendered prompt.
        placeholder: The text around it.
        written: The tokens that vLLM wants instead for image number `i` (from 0) of a (width, height); None if it wants
            the token itself.
    """

    token: str
    placeholder: str
    written: Callable[[int, tuple[int, int]], list[int]] | None = None

    def replaced(
        self, token_ids: Sequence[int], token_id: int | None, sizes: Sequence[tuple[int, int]] = ()
    ) -> list[int]:
        """Return a rendered prompt as vLLM wants it. sizes: of its images; unknown for embeddings."""
        if self.written is None:
            return list(token_ids)
        images = map(self.written, itertools.count(), itertools.chain(sizes, itertools.repeat((0, 0))))
        return [each for token in token_ids for each in (next(images) if token == token_id else [token])]


def image_placeholders(
    tokenizer: Any,
    placeholder: Callable[[int], str | None],
    image_token_id: int | None,
    wanted: str | None = None,
    *,
    inserts: bool = False,
    printed: str = "",
) -> ImagePlaceholders:
    """Return what stands for an image.

    Args:
        tokenizer: The model's.
        placeholder: What vLLM writes for image number `i` (from 1), if it says.
        image_token_id: From the model's config.
        wanted: The token that the operator has set.
        inserts: Whether the model's processor inserts the images itself.
        printed: The chat template's source, which must not print a stand-in.

    Raises:
        ModelLoadError: Nothing can stand for an image.
    """

    def encoded(text: str) -> list[int]:
        ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    own = None if image_token_id is None else tokenizer.convert_ids_to_tokens(image_token_id)
    if own is not None and encoded(own) != [image_token_id]:
        own = None
    if inserts:
        token = wanted or own or _stand_in(tokenizer, printed)
        return ImagePlaceholders(token, token, lambda number, size: [])
    if wanted is not None:
        return ImagePlaceholders(wanted, wanted)
    first = placeholder(1)
    if first is not None:
        ids = encoded(first)
        if len(ids) == 1 and first == placeholder(2):
            return ImagePlaceholders(first, first)
        if own is not None and image_token_id in ids:
            return ImagePlaceholders(own, first)
    if own is not None:
        return ImagePlaceholders(own, own)
    if first is None:
        raise ModelLoadError(
            "it is not known which token stands for an image in this model's prompts: "
            "set option.image_placeholder_token"
        )
    token = _stand_in(tokenizer, printed)
    logger.info("images are written as %r in this model's prompts", first)
    return ImagePlaceholders(token, token, lambda number, size: encoded(placeholder(number + 1) or ""))


def _stand_in(tokenizer: Any, printed: str) -> str:
    """Return a special token that nothing else prints."""
    for token in tokenizer.added_tokens_decoder.values():
        text = str(token.content)
        ends = (tokenizer.bos_token, tokenizer.eos_token)
        if token.special and text not in ends and text not in printed:
            return text
    raise ModelLoadError(
        "no token can stand for an image in this model's prompts: set option.image_placeholder_token"
    )
