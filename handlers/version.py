"""The version of what is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def _installed() -> str:
    try:
        return version("lmi-handler")
    except PackageNotFoundError:
        return "unknown"


VERSION = _installed()

FINGERPRINT = f"lmi-{VERSION}"
"""OpenAI's `system_fingerprint`, without which TGI's client does not recognise a chat."""
