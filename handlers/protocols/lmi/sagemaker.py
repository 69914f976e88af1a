"""SageMaker's headers: adapters, accepted media types, and custom attributes."""

from __future__ import annotations

from collections.abc import Mapping

from handlers.request import Incoming

INVOKE_ROUTES = frozenset({"/invocations", "/predictions/{model}", "/models/{model}/invoke"})
"""The routes on which LMI takes every schema."""

PREFIX = "x-amzn-sagemaker-"
_ADAPTER = f"{PREFIX}adapter-identifier"
_ATTRIBUTES = f"{PREFIX}custom-attributes"
ADAPTER_HEADERS = (_ADAPTER, _ATTRIBUTES)
_MOST_ATTRIBUTES = 1024
"""The most characters of the header: SageMaker's own limit."""


def accept_of(headers: Mapping[str, str]) -> str:
    """Return the media types that the client accepts, in lower case; empty if it does not say.

    Asynchronous and streamed invocations may name them in a header of SageMaker's own.

    Args:
        headers: With names in lower case.
    """
    return (headers.get("accept") or headers.get(f"{PREFIX}accept") or "").lower()


def adapter_of(incoming: Incoming) -> str | None:
    """Return the adapter that SageMaker's header, the query or a custom attribute names."""
    return request_properties(incoming).get(_ADAPTER) or None


def request_properties(incoming: Incoming) -> dict[str, str]:
    """Return the headers, and under other names the query's adapter and the custom attributes.

    Attributes have the form `name=value;name=value`; their names are read in lower case, as in LMI.
    """
    text = incoming.headers.get(_ATTRIBUTES, "")[:_MOST_ATTRIBUTES]
    pairs = (part.partition("=") for part in text.split(";") if "=" in part)
    attributes = {name.strip().lower(): value.strip() for name, _, value in pairs}
    queried = {_ADAPTER: incoming.query["adapter"]} if incoming.query.get("adapter") else {}
    return {**attributes, **queried, **incoming.headers}
