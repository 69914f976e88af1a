"""What scripts call a prompt, as the request that every backend answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from PIL import Image

from engine.sampling_params import MAX_INTEGER
from handlers.dialects.openai_messages import read_messages
from handlers.errors import ImageError, InvalidRequest
from handlers.request import ChatPrompt, ImagePart, Part, Prompt, TextPart, TextPrompt

_WRITTEN = (
    r"<\|vision_start\|><\|image_pad\|><\|vision_end\|>",
    r"\(<image>\./</image>\)",
    r"<\|image_(?P<number>[1-9][0-9]{0,3})\|>",
    r"<image>",
    r"<\|image\|>",
    r"<\|image_pad\|>",
    r"<start_of_image>",
    r"\[IMG\]",
)
"""How the model cards of the served families and vLLM's documentation write a picture in a prompt."""

_KEYS = {"prompt", "prompt_token_ids", "multi_modal_data"}
_IGNORED_KEYS = {"multi_modal_uuids", "type", "cache_salt"}


def prompts_in(given: Any) -> tuple[list[Any], bool]:
    """`generate`'s argument as a list of prompts, and whether it was one alone. Raises TypeError."""
    if isinstance(given, str | Mapping) or _is_ids(given):
        return [given], True
    if isinstance(given, Sequence) and not isinstance(given, bytes):
        return list(given), False
    raise TypeError(f"a prompt is a text, a dict or a list of such, not {type(given).__name__}")


def conversations_in(given: Any) -> tuple[list[Any], bool]:
    """`chat`'s argument as a list of conversations, and whether it was one alone. Raises TypeError."""
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise TypeError(f"a conversation is a list of messages, not {type(given).__name__}")
    if given and isinstance(given[0], Mapping):
        return [given], True
    return list(given), False


def read_prompt(given: Any, placeholder: str | None) -> TextPrompt:
    """One of `generate`'s prompts. placeholder: the model's own (see `Capabilities`). Raises InvalidRequest."""
    if isinstance(given, str):
        return TextPrompt(list(_parts(given, [], placeholder)))
    if _is_ids(given):
        return TextPrompt([], token_ids=_ids(given))
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"a prompt is a text, a dict or token ids, not {type(given).__name__}")
    for key in given:
        if key not in _KEYS | _IGNORED_KEYS and given[key] is not None:
            raise InvalidRequest(
                f"a prompt's {str(key)[:40]!r} is not supported; allowed: {', '.join(sorted(_KEYS))}"
            )
    pictures = _pictures(given.get("multi_modal_data"))
    ids, text = given.get("prompt_token_ids"), given.get("prompt")
    if ids is not None:
        return TextPrompt(list(pictures), token_ids=_ids(ids))
    if not isinstance(text, str):
        raise InvalidRequest("a prompt needs `prompt`, a text, or `prompt_token_ids`, a list of numbers")
    return TextPrompt(list(_parts(text, pictures, placeholder)))


def read_conversation(
    given: Any,
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[dict[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> ChatPrompt:
    """One of `chat`'s conversations. Raises InvalidRequest."""
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise InvalidRequest(f"a conversation is a list of messages, not {type(given).__name__}")
    return ChatPrompt(
        read_messages(list(given)),
        add_generation_prompt=add_generation_prompt and not continue_final_message,
        continue_final_message=continue_final_message,
        template=chat_template,
        template_kwargs=dict(chat_template_kwargs or {}),
        tools=tools,
    )


def prompt_text(prompt: Prompt, rendered: str) -> str | None:
    """What `RequestOutput.prompt` shows."""
    if isinstance(prompt, ChatPrompt):
        return rendered
    return None if prompt.token_ids is not None else rendered


def _parts(text: str, pictures: Sequence[ImagePart], placeholder: str | None) -> Iterator[Part]:
    """The text with each picture where its placeholder stands, or all in front where none is written."""
    pattern = "|".join(_WRITTEN)
    own = list(re.finditer(re.escape(placeholder), text)) if placeholder else []
    found = own or list(re.finditer(pattern, text))
    if not found:
        yield from pictures
        yield TextPart(text)
        return
    if not pictures and not own:
        yield TextPart(text)
        return
    order = _order(found, len(pictures))
    at = 0
    for match, index in zip(found, order, strict=True):
        if match.start() > at:
            yield TextPart(text[at : match.start()])
        yield pictures[index]
        at = match.end()
    if at < len(text):
        yield TextPart(text[at:])


def _order(found: Sequence[re.Match[str]], count: int) -> list[int]:
    """Which picture stands at each placeholder: numbered ones say so, others are filled in turn."""
    if len(found) != count:
        raise InvalidRequest(
            f"the prompt has {len(found)} placeholders of pictures ({found[0][0]}) and {count} pictures: "
            "write one for each, or none"
        )
    numbers = [match.groupdict().get("number") for match in found]
    if any(number is None for number in numbers):
        return list(range(count))
    order = [int(cast(str, number)) - 1 for number in numbers]
    if sorted(order) != list(range(count)):
        raise InvalidRequest(f"the prompt's pictures must be numbered from 1 to {count}, each once")
    return order


def _pictures(given: Any) -> list[ImagePart]:
    if given is None:
        return []
    if not isinstance(given, Mapping):
        raise InvalidRequest('multi_modal_data must be a dict: {"image": picture or list of pictures}')
    for modality, items in given.items():
        if modality != "image" and items is not None and not (isinstance(items, list) and not items):
            raise InvalidRequest(
                f"multi_modal_data: {str(modality)[:40]!r} is not supported; allowed: 'image'"
            )
    items = given.get("image")
    if items is None:
        return []
    if not isinstance(items, list | tuple):
        items = [items]
    return [ImagePart("", given=_picture(index, item)) for index, item in enumerate(items)]


def _picture(index: int, item: Any) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    if hasattr(item, "detach") and hasattr(item, "numpy"):
        item = item.detach().cpu().numpy()
    if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim == 3 and item.shape[2] in (3, 4):
        return Image.fromarray(item)
    raise ImageError(
        index,
        f"it is a {type(item).__name__}; give a PIL image, or an array of height x width x 3 bytes "
        "(embeddings are not supported)",
    )


def _is_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(token) is int for token in given)


def _ids(given: Any) -> list[int]:
    ids = (
        [int(token) for token in given] if isinstance(given, Sequence) and not isinstance(given, str) else []
    )
    if not ids or not all(0 <= token <= MAX_INTEGER for token in ids):
        raise InvalidRequest("prompt_token_ids must be a list of token ids, at least one")
    return ids
