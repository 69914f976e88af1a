"""The adapters API, as LMI has it.

Parameters come in the query, as LMI reads them, or as a JSON body, as SageMaker's own container libraries do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from handlers.backends.adapters import AdapterInfo, AdapterStore
from handlers.errors import Conflict, InvalidParameter, InvalidRequest, NotFound
from handlers.protocols.base import READ, Route, struct_reply
from handlers.protocols.body import read_options
from handlers.protocols.lmi.replies import LmiError
from handlers.request import Incoming, Reply

if TYPE_CHECKING:
    from handlers.service import Service

T = TypeVar("T")

_ALIAS = "x-amzn-sagemaker-adapter-alias"
_LONGEST_ALIAS = 128
MOST_LISTED = 100
"""Most items in one page: LMI's limit."""


class AdapterBody(msgspec.Struct):
    """Adds or updates an adapter. preload: has no effect, since adapters are always loaded before the answer."""

    name: str | None = None
    src: str | None = None
    preload: bool | None = None
    pin: bool | None = None


class Adapter(msgspec.Struct, forbid_unknown_fields=True):
    """One adapter, as it is shown."""

    name: str
    src: str
    preload: bool
    pin: bool


class AdapterList(msgspec.Struct, forbid_unknown_fields=True, rename="camel", omit_defaults=True):
    """A page of adapters. next_page_token: only if there are more."""

    adapters: list[Adapter]
    next_page_token: str | None = None


class AdapterStatus(msgspec.Struct, forbid_unknown_fields=True):
    """Says what has been done."""

    status: str


async def answer_adapters(service: Service, incoming: Incoming) -> Reply:
    """Lists, shows, adds, updates or removes adapters, as the route and the method say. Raises ServingError."""
    store = service.pipeline.adapters
    if store is None:
        raise InvalidRequest(
            "LoRA is not enabled. Adapters need the vLLM backend (option.rolling_batch=vllm) with "
            "option.enable_lora=true"
        )
    if incoming.method in READ:
        if incoming.adapter:
            return struct_reply(_one(store, incoming.adapter))
        shown, token = page_of(list(store.infos()), incoming.query)
        return struct_reply(AdapterList([_shown(info) for info in shown], token))
    if incoming.method == "DELETE":
        await store.remove(incoming.adapter)
        return _status(incoming, incoming.adapter, "unregistered")
    asked = _asked(incoming)
    if incoming.adapter:
        if asked.name not in (None, incoming.adapter):
            raise InvalidRequest("name: an adapter cannot be renamed; leave it out", param="name")
        await store.update(incoming.adapter, asked.src, pin=asked.pin)
        return _status(incoming, incoming.adapter, "updated")
    if not asked.name or not asked.src:
        missing = "src" if asked.name else "name"
        raise InvalidRequest(f"Parameter {missing} is required.", param=missing)
    if asked.name in service.names:
        raise Conflict(f"{asked.name!r} is the model's own name; choose another", param="name")
    await store.add(asked.name, asked.src, pin=bool(asked.pin))
    return _status(incoming, asked.name, "registered")


def _asked(incoming: Incoming) -> AdapterBody:
    """Read query and body; the query wins. Raises InvalidRequest."""
    asked = read_options(incoming, AdapterBody)
    asked.name = incoming.query.get("name", asked.name)
    asked.src = incoming.query.get("src", asked.src)
    for name in ("preload", "pin"):
        if name in incoming.query:
            setattr(asked, name, _flag(name, incoming.query[name]))
    return asked


def _flag(name: str, text: str) -> bool:
    known = {"true": True, "false": False, "1": True, "0": False}
    if text.lower() not in known:
        raise InvalidParameter(name, f"is {text[:20]!r}; allowed: true, false")
    return known[text.lower()]


def _one(store: AdapterStore, name: str) -> Adapter:
    for info in store.infos():
        if info.name == name:
            return _shown(info)
    raise NotFound(f"there is no adapter {name[:80]!r}", param="adapters")


def page_of(items: Sequence[T], query: Mapping[str, str]) -> tuple[Sequence[T], str | None]:
    """Return the items of the page that `limit` and `next_page_token` ask for, and the token of the next one.

    Raises:
        InvalidRequest: One of them is not a number.
    """
    first = _count(query, "next_page_token", 0)
    last = first + min(_count(query, "limit", MOST_LISTED) or MOST_LISTED, MOST_LISTED)
    return items[first:last], str(last) if last < len(items) else None


def _count(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise InvalidParameter(name, f"is {text[:20]!r}; allowed: a whole number")
    return int(text)


def _shown(info: AdapterInfo) -> Adapter:
    return Adapter(info.name, info.src, True, info.pin)


def _status(incoming: Incoming, name: str, done: str) -> Reply:
    alias = incoming.headers.get(_ALIAS, "")[:_LONGEST_ALIAS]
    return struct_reply(AdapterStatus(f"Adapter {alias or name} {done}"))


_PLACE = {
    "src": "The adapter's directory; wins over the body.",
    "pin": "Kept and shown: `true` or `false`.",
    "preload": "Adapters are loaded before the answer in any case.",
}


def _route(path: str, summary: str, *codes: int, **given: Any) -> tuple[Route, Route]:
    """Return the route, and the same below a model's name, which logs and metrics do not show."""
    route = Route(path, "adapters", summary, errors=(LmiError,), codes=(400, 404, *codes), **given)
    return route, replace(route, path="/models/{name}" + path)


ROUTES = (
    *_route(
        "/adapters",
        "The adapters that requests may name (LMI)",
        methods=READ,
        query={"limit": "How many at most; 100 at most.", "next_page_token": "Of the page before."},
        replies=(AdapterList,),
    ),
    *_route(
        "/adapters",
        "Load an adapter, named in the query or in the body (LMI)",
        *(408, 409, 413, 507),
        query={"name": "What requests call it; wins over the body.", **_PLACE},
        bodies=(AdapterBody,),
        replies=(AdapterStatus,),
    ),
    *_route(
        "/adapters/{adapter}/update",
        "Load an adapter again, from another directory if one is given (LMI)",
        *(408, 409, 413, 507),
        query=_PLACE,
        bodies=(AdapterBody,),
        replies=(AdapterStatus,),
    ),
    *_route("/adapters/{adapter}", "One adapter (LMI)", methods=READ, replies=(Adapter,)),
    *_route(
        "/adapters/{adapter}",
        "Unload an adapter; answered when its last request has ended (LMI)",
        408,
        methods=("DELETE",),
        replies=(AdapterStatus,),
    ),
)
