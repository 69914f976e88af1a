"""What SageMaker's runtime says in headers, and how the routes that it calls choose the framing of a stream."""

from __future__ import annotations

from collections.abc import Mapping

ROUTES = frozenset({"/invocations", "/predictions/{model}", "/models/{model}/invoke"})
"""The routes on which LMI takes every schema."""

_PREFIX = "x-amzn-sagemaker-"
ADAPTER = f"{_PREFIX}adapter-identifier"
_ATTRIBUTES = f"{_PREFIX}custom-attributes"
_MOST_ATTRIBUTES = 1024
"""Characters of the header: SageMaker's own limit."""


def accept_of(headers: Mapping[str, str]) -> str:
    """The media types that the client asks for, in lower case; empty where it does not say.

    headers: names in lower case. Asynchronous and streamed invocations may bring it under SageMaker's own name.
    """
    return (headers.get("accept") or headers.get(f"{_PREFIX}accept") or "").lower()


def adapter_of(headers: Mapping[str, str]) -> str | None:
    """The adapter that SageMaker's header, or a custom attribute of that name, asks for."""
    if name := headers.get(ADAPTER):
        return name
    return attributes_of(headers).get(ADAPTER) or None


def attributes_of(headers: Mapping[str, str]) -> dict[str, str]:
    """The custom attributes of the form `name=value;name=value`, as LMI reads them: names in lower case."""
    text = headers.get(_ATTRIBUTES, "")[:_MOST_ATTRIBUTES]
    pairs = (part.partition("=") for part in text.split(";") if "=" in part)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def wants_lines(accept: str) -> bool:
    return "jsonlines" in accept and "text/event-stream" not in accept
