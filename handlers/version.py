"""The version of what is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def _installed() -> str:
    try:
        return version("lmi-handler")
    except PackageNotFoundError:
        return "unknown"


VERSION = _installed()
