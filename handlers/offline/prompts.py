"""The prompts that scripts give, also in the forms of vLLM's older pages, as requests to the backend."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from engine.sampling_params import MAX_INTEGER
from handlers.errors import InvalidRequest
from handlers.offline.images import MultiModalData, PromptImages
from handlers.protocols.openai.messages import read_messages
from handlers.request import ChatPrompt, MediaPart, Part, TextPart, TextPrompt

Span = tuple[int, int]

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
"""Placeholders of an image in the model cards of the served families and in vLLM's documentation."""

_KEYS = {"prompt", "prompt_token_ids", "multi_modal_data"}
_IGNORED_KEYS = {"multi_modal_uuids", "type", "cache_salt"}


def prompts_with_data(prompts: Any, prompt_token_ids: Sequence[Any] | None, data: Any) -> Any:
    """Return prompts from the arguments of vLLM's `generate` up to 0.5, which took token ids and images separately."""
    if prompt_token_ids is None and data is None:
        return prompts
    ids = prompt_token_ids
    alone = isinstance(prompts, str) or (prompts is None and bool(ids) and isinstance(ids[0], int))  # type: ignore[index]
    texts = [prompts] if isinstance(prompts, str) else prompts
    token_ids = [ids] if ids is not None and alone and isinstance(ids[0], int) else ids
    count = len(texts) if texts is not None else len(token_ids or ())
    if isinstance(data, MultiModalData) and count > 1:
        data = [MultiModalData(data.type, data.data[number : number + 1]) for number in range(count)]
    each = list(data) if isinstance(data, list | tuple) else [data] * count
    for name, given in (("prompt_token_ids", token_ids), ("multi_modal_data", each)):
        if given is not None and len(given) != count:
            raise ValueError(f"{name}: give one for each of the {count} prompts")
    made = [
        {
            **({"prompt": texts[number]} if texts is not None else {}),
            **({"prompt_token_ids": token_ids[number]} if token_ids is not None else {}),
            "multi_modal_data": each[number],
        }
        for number in range(count)
    ]
    return made[0] if alone else made


def prompts_in(given: Any) -> tuple[list[Any], bool]:
    """Return `generate`'s argument as a list of prompts, and whether it was a single one. Raises TypeError."""
    if isinstance(given, str | Mapping) or _is_ids(given):
        return [given], True
    if isinstance(given, Sequence) and not isinstance(given, bytes):
        return list(given), False
    raise TypeError(f"a prompt is a text, a dict or a list of these, not {type(given).__name__}")


def conversations_in(given: Any) -> tuple[list[Any], bool]:
    """Return `chat`'s argument as a list of conversations, and whether it was a single one. Raises TypeError."""
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise TypeError(f"a conversation is a list of messages, not {type(given).__name__}")
    if given and isinstance(given[0], Mapping):
        return [given], True
    return list(given), False


def read_prompt(given: Any, placeholder: str | None, images: PromptImages) -> TextPrompt:
    """Read one of `generate`'s prompts. placeholder: the model's (see `Capabilities`). Raises InvalidRequest."""
    if isinstance(given, str):
        return TextPrompt(list(_parts(given, [], placeholder, images)))
    if _is_ids(given):
        return TextPrompt([], token_ids=_ids(given))
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"a prompt is a text, a dict or token ids, not {type(given).__name__}")
    for key in given:
        if key not in _KEYS | _IGNORED_KEYS and given[key] is not None:
            raise InvalidRequest(f"a prompt's {str(key)[:40]!r} is not supported; allowed: {', '.join(sorted(_KEYS))}")
    media = images.read(given.get("multi_modal_data"))
    ids, text = given.get("prompt_token_ids"), given.get("prompt")
    if ids is not None:
        return TextPrompt(list(media), token_ids=_one_each(_ids(ids), media, images))
    if not isinstance(text, str):
        raise InvalidRequest("a prompt needs `prompt`, a text, or `prompt_token_ids`, a list of numbers")
    return TextPrompt(list(_parts(text, media, placeholder, images)))


def read_conversation(
    given: Any,
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[dict[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> ChatPrompt:
    """Read one of `chat`'s conversations. Raises InvalidRequest."""
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


def _parts(text: str, given: Sequence[MediaPart], placeholder: str | None, images: PromptImages) -> Iterator[Part]:
    """Yield the text with each image in place of its placeholder, or all images before a text without one."""
    pattern = "|".join(_WRITTEN)
    own = list(re.finditer(re.escape(placeholder), text)) if placeholder else []
    found = own or list(re.finditer(pattern, text))
    if not found:
        yield from given
        yield TextPart(text)
        return
    if not given and not own:
        yield TextPart(text)
        return
    spans = [match.span() for match in found]
    if len(found) > len(given) > 0:
        spans = _gathered(spans, given, images)
    order = _order(found, spans, given)
    at = 0
    for (start, end), index in zip(spans, order, strict=True):
        if start > at:
            yield TextPart(text[at:start])
        yield given[index]
        at = end
    if at < len(text):
        yield TextPart(text[at:])


def _gathered(spans: Sequence[Span], given: Sequence[MediaPart], images: PromptImages) -> list[Span]:
    """Join placeholders as vLLM did until 0.5: as many adjacent ones as an image has tokens stand for that image.

    Returns one span for each image, or the given spans if they cannot be divided in this way.
    """
    made: list[Span] = []
    at = 0
    for part in given:
        if at == len(spans):
            return list(spans)
        run = 1
        while at + run < len(spans) and spans[at + run][0] == spans[at + run - 1][1]:
            run += 1
        size = next((size for size in images.sizes(part) if size <= run), None)
        if size is None:
            return list(spans)
        made.append((spans[at][0], spans[at + size - 1][1]))
        at += size
    return made if at == len(spans) else list(spans)


def _order(found: Sequence[re.Match[str]], spans: Sequence[Span], given: Sequence[MediaPart]) -> list[int]:
    """Return the number of the image at each span: the placeholder's own number, or else the next one."""
    count = len(given)
    if len(spans) != count:
        raise InvalidRequest(
            f"the prompt has {len(found)} placeholders of images ({found[0][0]}) and {count} images: "
            "write one for each, or none"
        )
    numbers = [match.groupdict().get("number") for match in found]
    if len(found) != count or any(number is None for number in numbers):
        return list(range(count))
    order = [int(cast(str, number)) - 1 for number in numbers]
    if sorted(order) != list(range(count)):
        raise InvalidRequest(f"the prompt's images must be numbered from 1 to {count}, each once")
    return order


def _one_each(ids: list[int], given: Sequence[MediaPart], images: PromptImages) -> list[int]:
    """Reduce the placeholders in a prompt of tokens to one for each image."""
    if not given:
        return ids
    token_id = images.token_id(given[0])
    spans = [(at, at + 1) for at, token in enumerate(ids) if token == token_id]
    if len(spans) <= len(given):
        return ids
    places = _gathered(spans, given, images)
    left_out = {at for start, end in places for at in range(start + 1, end)}
    return [token for at, token in enumerate(ids) if at not in left_out]


def _is_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(token) is int for token in given)


def _ids(given: Any) -> list[int]:
    ids = [int(token) for token in given] if isinstance(given, Sequence) and not isinstance(given, str) else []
    if not ids or not all(0 <= token <= MAX_INTEGER for token in ids):
        raise InvalidRequest("prompt_token_ids must be a list of token ids, at least one")
    return ids
