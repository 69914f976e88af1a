"""The types of options: what text each accepts, how the text becomes a value, and how messages say what is allowed."""

from __future__ import annotations

import ipaddress
import json
import re
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import AllowInfNan, BeforeValidator, StringConstraints

from properties.hosts import canonical_host

MODALITIES = ("image", "video", "audio")


@dataclass(frozen=True)
class Allowed:
    """What a type accepts, in words that complete the sentence "allowed: ..."."""

    text: str


def _json(text: str, kind: type, name: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at character {error.pos + 1}") from None
    if not isinstance(value, kind):
        raise ValueError(f"not a JSON {name}")
    return value


def _object(value: object) -> object:
    return _json(value, dict, "object") if isinstance(value, str) else value


def _names(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return _json(value, list, "list")
    return [part.strip() for part in value.split(",") if part.strip()]


def _each(read: Callable[[str], object]) -> BeforeValidator:
    """Read a list of names, and refuse those that `read` refuses."""

    def names(value: object) -> object:
        found = _names(value)
        for name in found if isinstance(found, list) else ():
            if isinstance(name, str):
                read(name)
        return found

    return BeforeValidator(names)


def _address(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"[0-9.]+", value):
        try:
            socket.inet_aton(value)  # takes the short forms that the operating system takes, such as 127.1
        except OSError:
            raise ValueError("not an IP address") from None
    return value


def _network(name: str) -> object:
    return ipaddress.ip_network(name) if "/" in name else canonical_host(name)


_ORIGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(\[[^]\s]*\]|[^]\s/?#@:[]+)(?::(\d{1,5}))?")
_DEFAULT_PORTS = {"http": 80, "https": 443}


def _origin(name: str) -> None:
    """Refuse origins that no browser sends, since an Origin header is compared character by character."""
    if name in ("*", "null"):
        return
    found = _ORIGIN.fullmatch(name)
    if found is None or (found[3] is not None and int(found[3]) > 65535):
        raise ValueError(f"{name!r} is not an origin as browsers send it")
    if "*" in found[2]:
        raise ValueError(f"{name!r} has a wildcard: write each origin, or * alone for any")
    scheme, host = found[1].lower(), canonical_host(found[2])
    sent = f"{scheme}://[{host}]" if ":" in host else f"{scheme}://{host}"
    if found[3] is not None and int(found[3]) != _DEFAULT_PORTS.get(scheme):
        sent += f":{int(found[3])}"
    if name != sent:
        raise ValueError(f"browsers do not send {name!r}: write {sent}")


def _devices(value: object) -> object:
    if not isinstance(value, str) or value == "*":
        return value
    parts = (part.strip() for part in re.split("[;,]", value.strip().removeprefix("[").removesuffix("]")))
    return [re.sub(r"^gpu(?=\d)", "", part, flags=re.IGNORECASE) for part in parts if part]


def _limits(value: object) -> object:
    """Read `{"image": 4}`, `{"image": {"count": 4}}` (vLLM) or `image=4,video=2` as one count per modality."""
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            value = _json(value, dict, "object")
        else:
            parts = (part.partition("=") for part in value.split(",") if part.strip())
            value = {name.strip(): count.strip() for name, _, count in parts}
    if not isinstance(value, dict):
        return value
    unknown = sorted(name for name in map(str, value) if name.lower() not in MODALITIES)
    if unknown:
        raise ValueError(f"unknown modality {', '.join(unknown)}")
    counts = {str(name).lower(): _count(str(name), entry) for name, entry in value.items()}
    return dict.fromkeys(MODALITIES, 0) | {"image": 1} | counts


def _count(name: str, entry: object) -> object:
    if not isinstance(entry, dict):
        return entry
    if "count" not in entry:
        raise ValueError(f"{name} has no count")
    return entry["count"]


def _media(value: object) -> object:
    """Read `{"image": {"rgba_background_color": [0, 0, 0]}}`, the part of vLLM's option that has a meaning here."""
    value = _object(value)
    if not isinstance(value, dict):
        return value
    value = {str(modality).lower(): options for modality, options in value.items()}
    for modality, options in value.items():
        if not isinstance(options, dict) or (modality == "image" and options.keys() - {"rgba_background_color"}):
            raise ValueError("only image.rgba_background_color is known")
        color = options.get("rgba_background_color", [255, 255, 255])
        whole = isinstance(color, list) and all(type(part) is int and 0 <= part <= 255 for part in color)
        if not whole or len(color) != 3:
            raise ValueError("rgba_background_color must be three whole numbers from 0 to 255")
    return value


def _one_of(spellings: dict[str, str]) -> BeforeValidator:
    return BeforeValidator(lambda value: spellings.get(value.lower(), value) if isinstance(value, str) else value)


_SUFFIXES = {
    letter: base**power for letters, base in (("kmgt", 1000), ("KMGT", 1024)) for power, letter in enumerate(letters, 1)
}


def _tokens(value: object) -> object:
    """Read `1k` as 1000 and `1K` as 1024, as on vLLM's command line.

    Only the former allows fractions, as in `25.6k`.
    """
    found = isinstance(value, str) and re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([kmgtKMGT])", value.strip())
    if not found:
        return value
    number, letter = found.groups()
    if letter.isupper() and "." in number:
        raise ValueError(f"no parts of {letter}; {number}{letter.lower()} is allowed")
    return int(float(number) * _SUFFIXES[letter])


def _length(value: object) -> object:
    """Read `auto` and -1, with which vLLM chooses, as None."""
    return None if str(value).strip().lower() in ("auto", "-1") else _tokens(value)


def _shape(value: object) -> object:
    if isinstance(value, str):
        value = [part.strip() for part in value.strip("()[] ").split(",") if part.strip()]
    if isinstance(value, list) and len(value) != 4:
        raise ValueError("four numbers are needed")
    return value


def _refusing(words: Collection[str], reason: str) -> BeforeValidator:
    def read(value: object) -> object:
        if isinstance(value, str) and value.lower() in words:
            raise ValueError(reason)
        return value

    return BeforeValidator(read)


Count = Annotated[int, Ge(0), Allowed("a whole number from 0")]
Positive = Annotated[int, Ge(1), Allowed("a whole number from 1")]
Tokens = Annotated[
    Positive | None, BeforeValidator(_tokens), Allowed("a whole number from 1, or one such as 8k (8000) or 8K (8192)")
]
Length = Annotated[
    Positive | None,
    BeforeValidator(_length),
    Allowed("a whole number from 1, or one such as 8k (8000) or 8K (8192); auto (or -1) for the default"),
]
Port = Annotated[int, Ge(0), Le(65535), Allowed("a port number from 0 (any free port) to 65535")]
Seconds = Annotated[float, Gt(0), AllowInfNan(False), Allowed("a number of seconds above 0")]
Amount = Annotated[float, Ge(0), AllowInfNan(False), Allowed("a number from 0")]
Fraction = Annotated[float, Gt(0), Le(1), Allowed("a number above 0, at most 1")]
Seed = Annotated[int, Ge(0), Le(2**64 - 1), Allowed("a whole number from 0 to 2^64-1")]
Degree = Annotated[Annotated[int, Ge(1)] | Literal["max"], Allowed("a whole number from 1, or max")]
Shape = Annotated[
    list[Annotated[int, Ge(1)]],
    BeforeValidator(_shape),
    Allowed("images, channels, height and width, each from 1: 1,3,336,336"),
]
Word = Annotated[str, StringConstraints(to_lower=True)]
"""A name that a backend knows; all of these are written in lower case."""

_DTYPES = {
    "fp32": "float32", "float": "float32", "torch.float32": "float32", "fp16": "float16", "half": "float16",
    "torch.float16": "float16", "bf16": "bfloat16", "torch.bfloat16": "bfloat16",
}  # fmt: skip
Dtype = Annotated[
    Literal["auto", "float32", "float16", "bfloat16"],
    _one_of(_DTYPES),
    Allowed("auto, float32 (fp32), float16 (fp16), bfloat16 (bf16)"),
]
_PIPELINES = ("image-text-to-text", "image-to-text", "visual-question-answering", "any-to-any")
_NO_TEXT = ("text-embedding", "feature-extraction", "sentence-similarity", "classify", "text-classification", "score")


_ENGINES = (
    "pytorch", "onnxruntime", "rust", "tensorflow", "tensorrt", "tritonserver", "xgboost", "mxnet", "lightgbm", "llama",
    "paddlepaddle",
)  # fmt: skip


Engine = Annotated[
    Literal["Python"],
    _refusing(_ENGINES, "an engine of DJL's for other kinds of models; this server generates text"),
]
Task = Annotated[
    Literal["auto", "generate", "text-generation"],
    _refusing(_NO_TEXT, "embeddings, classes and scores are not served"),
    _one_of(dict.fromkeys((*_PIPELINES, "text2text-generation", "conversational"), "generate")),
    Allowed(f"auto, generate, text-generation and what means the same: {', '.join(_PIPELINES)}"),
]
Limits = Annotated[
    dict[str, Annotated[int, Ge(0)]],
    BeforeValidator(_limits),
    Allowed('counts from 0 for image, video, audio, as {"image": 4, "video": 0} or image=4,video=0'),
]
Names = Annotated[list[str], BeforeValidator(_names), Allowed("a list: a,b or a JSON list")]
Hosts = Annotated[
    list[str],
    _each(canonical_host),
    Allowed("a list of host names, without scheme, port or path: a,b or a JSON list"),
]
Origins = Annotated[
    list[str],
    _each(_origin),
    Allowed("a list of origins such as https://app.example, without a path, or *: a,b or a JSON list"),
]
Networks = Annotated[
    list[str],
    _each(_network),
    Allowed("a list of host names, IP addresses and networks such as 10.0.0.0/8: a,b or a JSON list"),
]
Devices = Annotated[
    Literal["*"] | Annotated[list[Annotated[int, Ge(0)]], MinLen(1)],
    BeforeValidator(_devices),
    Allowed("* for all, or device numbers: 0;1 or a JSON list"),
]
Address = Annotated[
    str,
    BeforeValidator(_address),
    Allowed("an IP address or a host name of this machine; 0.0.0.0 for all its addresses"),
]
JsonObject = Annotated[dict[str, Any], BeforeValidator(_object), Allowed("a JSON object")]
MediaOptions = Annotated[
    dict[str, Any],
    BeforeValidator(_media),
    Allowed('a JSON object such as {"image": {"rgba_background_color": [255, 255, 255]}}'),
]
