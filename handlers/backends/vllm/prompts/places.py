"""What stands for an image in a prompt of a model that vLLM serves.

Prompts are rendered with one token for each image. Where a model's processor wants more than one token there, or
none at all, that one is a stand-in, which is exchanged before vLLM places the images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ModelLoadError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImagePlaceholders:
    """token: the one that a rendered prompt has for each image. placeholder: the text around it.

    spelled: the tokens that vLLM wants in its stead for image number `i` (from 0); None where it wants the token.
    written: all the tokens of an image of that width and height, for a model of which vLLM wants them in the prompt.
    """

    token: str
    placeholder: str
    spelled: Callable[[int], list[int]] | None = None
    written: Callable[[int, int], list[int]] | None = None

    def exchanged(
        self, token_ids: Sequence[int], token_id: int | None, sizes: Sequence[tuple[int, int]] = ()
    ) -> list[int]:
        """A rendered prompt as vLLM wants it. sizes: (width, height) of its images."""
        if self.written is not None:
            written, waiting = self.written, iter(sizes)
            return [
                each
                for token in token_ids
                for each in (written(*next(waiting)) if token == token_id else [token])
            ]
        if self.spelled is None:
            return list(token_ids)
        made: list[int] = []
        seen = 0
        for token in token_ids:
            if token == token_id:
                made += self.spelled(seen)
                seen += 1
            else:
                made.append(token)
        return made


def image_placeholders(
    tokenizer: Any,
    placeholder: Callable[[int], str | None],
    image_token_id: int | None,
    wanted: str | None = None,
    *,
    inserts: bool = False,
    printed: str = "",
) -> ImagePlaceholders:
    """placeholder: what vLLM writes for image number `i` (from 1), where it says.

    image_token_id: from the model's config. wanted: the operator's own token. inserts: the model's processor puts
    the images in by itself. printed: the chat template's source, which must not print a stand-in.
    Raises ModelLoadError when nothing can stand for an image.
    """

    def encoded(text: str) -> list[int]:
        ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    own = None if image_token_id is None else tokenizer.convert_ids_to_tokens(image_token_id)
    if own is not None and encoded(own) != [image_token_id]:
        own = None
    if inserts:
        token = wanted or own or _stand_in(tokenizer, printed)
        return ImagePlaceholders(token, token, lambda _: [])
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
            "it cannot be told which token stands for an image in this model's prompts: "
            "set option.image_placeholder_token"
        )
    token = _stand_in(tokenizer, printed)
    logger.info("images are written as %r in this model's prompts", first)
    return ImagePlaceholders(token, token, lambda number: encoded(placeholder(number + 1) or ""))


def rows_of_mistral(processor: Any) -> Callable[[int, int], list[int]] | None:
    """Return `ImagePlaceholders.written` for a model in Mistral's own format.

    vLLM expects every token of such a model's images in the prompt, as mistral_common writes them.

    Args:
        processor: vLLM's processor for the model.

    Returns:
        None if the processor is of another kind.
    """
    break_id, end_id = getattr(processor, "image_break_id", None), getattr(processor, "image_end_id", None)
    pixels: Any = getattr(processor, "image_processor", None)
    if break_id is None or not hasattr(pixels, "get_number_of_image_patches"):
        return None

    def written(width: int, height: int) -> list[int]:
        _, rows, columns = pixels.get_number_of_image_patches(height, width)
        tokens = [*[processor.image_token_id] * columns, break_id] * rows
        tokens[-1] = end_id
        return tokens

    return written


def _stand_in(tokenizer: Any, printed: str) -> str:
    """A special token that nothing else prints."""
    for token in tokenizer.added_tokens_decoder.values():
        text = str(token.content)
        ends = (tokenizer.bos_token, tokenizer.eos_token)
        if token.special and text not in ends and text not in printed:
            return text
    raise ModelLoadError(
        "no token can stand for an image in this model's prompts: set option.image_placeholder_token"
    )
