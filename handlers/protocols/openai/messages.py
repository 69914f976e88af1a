"""Chat messages and their content parts, in the shapes that OpenAI's clients and vLLM's users send.

The structs describe in `/openapi.json` what is read. Reading is done by hand, because many clients send slightly
different shapes, and because an error names the path of the value at fault.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from PIL.Image import Image

from handlers.errors import InvalidParameter, InvalidRequest
from handlers.protocols.base import described, reference
from handlers.protocols.body import kind_of, refuse_unknown, shown_value
from handlers.protocols.known_names import KnownNames
from handlers.request import EmbeddingsPart, Grid, ImagePart, Message, Part, TextPart

_ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
_IMAGE_PARTS = frozenset({"image_url", "input_image"})
_IMAGE_KEYS = frozenset({"type", "image_url", "detail", "uuid", "id", "index", "cache_control"})
_URL_KEYS = frozenset({"url", "detail", "uuid", "format", "media_type", "mime_type", "cache_control"})
_DETAILS = (None, "auto", "low", "high", "original")
_PART = 'send it as a part of the content: {"type": "image_url", "image_url": {"url": "..."}}'
_CONTINUE = "send continue_final_message: true with the request"
_NOT_READ = {"prefix": _CONTINUE, "partial": _CONTINUE}
"""Keys of messages that other servers follow -> what to send instead."""

_MEDIA = {
    "image": _PART,
    "picture": _PART,
    "attachment": _PART,
    "audio": "it takes text and images only",
    "video": "it takes text and images only",
}
"""Parts of the names of keys and types that bring more than text -> what to send instead."""

_NAMES = KnownNames(
    {
        "role",
        "content",
        "name",
        "tool_calls",
        "tool_call_id",
        "reasoning",
        "reasoning_content",
        "refusal",
        "function_call",
    },
    _NOT_READ,
)
_MOST_MESSAGES = 32
"""The number of last messages whose keys are checked: a client writes all of them in the same way."""

FEWEST_PARTS = 4096
"""The number of messages, or of parts, that a chat may have with any model; a longer context allows more."""

_ROWS, _GRID = "image_embeds", "image_grid_thw"


_NotEmpty = Annotated[str, Meta(min_length=1)]


class ImageUrl(Struct):
    """An image's URL: https:, http: or data:. `detail` has no effect."""

    url: _NotEmpty
    detail: str | None = None


class ImageContent(Struct):
    """An image."""

    type: Literal["image_url", "input_image"]
    image_url: ImageUrl | _NotEmpty


class Embeddings(Struct):
    """Tensors as torch.save writes them, in base64; the grid may also be given as numbers."""

    image_embeds: _NotEmpty
    image_grid_thw: str | list[int | list[int]] | None = None


class EmbeddingsContent(Struct):
    """An image's embeddings, [tokens, hidden size], where option.enable_mm_embeds allows them."""

    type: Literal["image_embeds"]
    image_embeds: _NotEmpty | Embeddings


class TextContent(Struct):
    """A text."""

    type: Literal["text", "input_text", "output_text"]
    text: str


_PARTS = (TextContent, ImageContent, EmbeddingsContent)
_LIST_OF_PARTS = {"type": "array", "items": {"anyOf": [*(reference(part) for part in _PARTS), {"type": "string"}]}}


class RequestMessage(Struct):
    """One turn. Roles are those that the model's chat template knows: system, user, assistant, tool and others."""

    role: Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]
    content: Annotated[str | list[Any], described(*_PARTS, anyOf=[{"type": "string"}, _LIST_OF_PARTS])]
    name: str | None = None
    tool_call_id: str | None = None


class AssistantMessage(Struct):
    """An earlier answer of the model, which may consist of calls only."""

    role: Literal["assistant"]
    tool_calls: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    content: str | None = None


def read_messages(messages: list[Any], *, embeddings: bool = False, context: int = 0) -> list[Message]:
    """Return the messages of a chat.

    embeddings: clients may send embeddings in place of images. context: the model's context in tokens, 0 if not known;
    each message, and each part of one, takes at least one.

    Raises:
        InvalidRequest: It names the path of what is wrong, as in "messages[1].content[0].image_url.url".
    """
    if not messages:
        raise InvalidParameter("messages", "is empty: send at least one")
    _check_number(len(messages), "messages", context)
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    parts = sum(len(content) for content in contents if isinstance(content, list))
    _check_number(parts, "parts in the contents of its messages", context)
    read = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    kinds = {type(part) for message in read for part in message.parts}
    if EmbeddingsPart in kinds and not embeddings:
        raise InvalidRequest(
            f"{_ROWS}: this server takes images, not their embeddings; the operator can allow them with "
            "option.enable_mm_embeds=true",
            param=_ROWS,
        )
    if {EmbeddingsPart, ImagePart} <= kinds:
        raise InvalidRequest(f"{_ROWS}: a request holds images or embeddings of images, not both", param=_ROWS)
    return read


def _check_number(count: int, what: str, context: int) -> None:
    if count > (most := max(FEWEST_PARTS, context)):
        raise InvalidRequest(
            f"the request has {count} {what}, more than this model's context has room for; allowed: at most {most}",
            param="messages",
        )


def misspelt(messages: list[Any]) -> list[str]:
    """Return warnings about misspelt names in messages whose intended name is not given as well."""
    found: list[str] = []
    for i in range(max(0, len(messages) - _MOST_MESSAGES), len(messages)):
        found += _NAMES.misspelt(messages[i], f"messages[{i}]", only_missing=True)
    return found


def _message(message: Any, path: str) -> Message:
    if not isinstance(message, dict):
        raise _wrong(path, "an object", message)
    role = message.get("role")
    if role is None:
        raise _missing(f"{path}.role")
    if not isinstance(role, str):
        raise _wrong(f"{path}.role", "a string", role)
    if not _ROLE.fullmatch(role):
        raise InvalidParameter(
            f"{path}.role",
            f"is {role[:40]!r}; allowed: system, developer, user, assistant, tool, or another "
            "word that the model's chat template knows",
        )
    for key, instead in _NOT_READ.items():
        if message.get(key):
            raise InvalidParameter(f"{path}.{key}", f"is not read by this server: {instead}")
    _refuse_media(message, path)
    name, call_id, reasoning = (_optional_string(message, key, path) for key in ("name", "tool_call_id", "reasoning"))
    if reasoning is None:
        reasoning = _optional_string(message, "reasoning_content", path)
    calls = _calls(message, path)
    content = message.get("content")
    if content is None:  # As in a reply with only reasoning or calls; the content is then empty, as in vLLM.
        content = message.get("refusal") or []
        if not content and not calls and reasoning is None:
            _refuse_instead_of_content(message, path)
    return Message(
        role=role,
        parts=_content(content, f"{path}.content"),
        text_only=isinstance(content, str),
        name=name,
        tool_calls=calls or None,
        tool_call_id=call_id,
        reasoning=reasoning,
    )


def _refuse_media(fields: dict[str, Any], path: str, param: str | None = None) -> None:
    """Refuse keys that seem to bring media. param: the error's, if it is not the key's own path."""
    for key, value in fields.items():
        if not isinstance(value, str | list | dict | Image) or not value:
            continue
        for name, instead in _MEDIA.items():
            if name in key.lower():
                where = f"{path}.{ascii(key[:40])[1:-1]}"
                raise InvalidRequest(f"{where} is not read by this server: {instead}", param=param or where)


def _refuse_instead_of_content(message: dict[str, Any], path: str) -> None:
    """Refuse a message without content whose text seems to be under another name, rather than answer an empty one."""
    for name, known in _NAMES.nearest(message):
        if known == "content" and message[name]:
            raise InvalidParameter(
                f"{path}.content", f"is missing; the key {name!r} that the message has is not read by this server"
            )


def _calls(message: dict[str, Any], path: str) -> list[dict[str, Any]] | None:
    """Return the calls of an earlier answer; `function_call` is OpenAI's older form for a single call."""
    calls = message.get("tool_calls")
    if calls is None and isinstance(message.get("function_call"), dict):
        return [{"type": "function", "function": message["function_call"]}]
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise _wrong(f"{path}.tool_calls", "a list of objects", calls)
    return calls


def _optional_string(message: dict[str, Any], key: str, path: str) -> str | None:
    value = message.get(key)
    if value is not None and not isinstance(value, str):
        raise _wrong(f"{path}.{key}", "a string", value)
    return value


def _content(content: Any, path: str) -> list[Part]:
    if isinstance(content, str):
        return [TextPart(content)]
    if isinstance(content, list):
        return [_part(part, f"{path}[{i}]") for i, part in enumerate(content) if not _is_empty(part)]
    raise _wrong(path, "a string or a list of parts", content)


def _is_empty(part: Any) -> bool:
    """Whether a text part's text is null, as some clients send it; vLLM skips it as well."""
    return isinstance(part, dict) and part.get("type") in ("text", "refusal") and part.get(part["type"], 0) is None


def _part(part: Any, path: str) -> Part:
    if isinstance(part, str):
        return TextPart(part)
    if not isinstance(part, dict):
        raise _wrong(path, "an object", part)
    kind = part.get("type")
    if kind is None:
        kind = next((key for key in ("text", "image_url", _ROWS) if key in part), None)
    if kind is None:
        raise _missing(f"{path}.type")
    if not isinstance(kind, str):
        raise _wrong(f"{path}.type", "a string", kind)
    if kind in _TEXT_PARTS:
        key = _TEXT_PARTS[kind]
        _refuse_media(part, path, param=path)
        return TextPart(_string(part.get(key), f"{path}.{key}"))
    if kind in _IMAGE_PARTS:
        refuse_unknown(part, _IMAGE_KEYS, path)
        _check_detail(part, path)
        return ImagePart(_url(part.get("image_url"), f"{path}.image_url"))
    if kind == _ROWS:
        return _embeddings(part.get(_ROWS), f"{path}.{_ROWS}")
    if isinstance(part.get(kind), Image):  # As a script may, but no body can.
        return ImagePart("", given=part[kind])
    instead = next((f"; {instead}" for name, instead in _MEDIA.items() if name in kind.lower()), "")
    raise InvalidParameter(
        f"{path}.type", f"is {kind[:40]!r}; this server reads parts of type text, image_url and image_embeds{instead}"
    )


def _url(image_url: Any, path: str) -> str:
    """Return the URL, which may be in an object with a `url`; `detail` has no meaning for these models."""
    if isinstance(image_url, dict):
        refuse_unknown(image_url, _URL_KEYS, path)
        _check_detail(image_url, path)
        image_url, path = image_url.get("url"), f"{path}.url"
    url = _string(image_url, path)
    if not url:
        raise InvalidParameter(path, "is empty: send a https:, http: or data: URL")
    return url


def _check_detail(fields: dict[str, Any], path: str) -> None:
    if (detail := fields.get("detail")) not in _DETAILS:
        allowed = ", ".join(filter(None, _DETAILS))
        raise InvalidParameter(f"{path}.detail", f"is {shown_value(detail)}; allowed: {allowed}")


def _embeddings(given: Any, path: str) -> EmbeddingsPart:
    """Read one tensor, or an object with it and the grid; each as `torch.save` writes it."""
    if not isinstance(given, dict):
        return EmbeddingsPart(_string(given, path))
    if unknown := given.keys() - {_ROWS, _GRID}:
        raise InvalidParameter(path, f"holds {min(unknown)[:40]!r}; allowed: {_ROWS} and {_GRID}")
    rows = _string(given.get(_ROWS), f"{path}.{_ROWS}")
    grid = given.get(_GRID)
    if grid is None or isinstance(grid, str):
        return EmbeddingsPart(rows, grid)
    return EmbeddingsPart(rows, _grid(grid, f"{path}.{_GRID}"))


def _grid(given: Any, path: str) -> Grid:
    """Read a grid given as numbers: [frames, rows, columns], or a list that contains only this list."""
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], list):
        given = given[0]
    match given:
        case [int(frames), int(rows), int(columns)] if all(
            type(number) is int and 1 <= number < 2**31 for number in given
        ):
            return frames, rows, columns
    raise InvalidParameter(path, "must be 3 whole numbers from 1, or what torch.save writes of them, in base64")


def _string(value: Any, path: str) -> str:
    if value is None:
        raise _missing(path)
    if not isinstance(value, str):
        raise _wrong(path, "a string", value)
    return value


def _missing(path: str) -> InvalidRequest:
    return InvalidParameter(path, "is missing")


def _wrong(path: str, wanted: str, value: Any) -> InvalidRequest:
    return InvalidParameter(path, f"is {kind_of(value)}, not {wanted}")
