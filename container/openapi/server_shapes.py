"""What the server says of itself."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class Ping(Struct, forbid_unknown_fields=True):
    status: str
    reason: str


class Health(Struct, forbid_unknown_fields=True):
    status: Literal["ok"]


class Unhealthy(Struct, forbid_unknown_fields=True):
    status: str
    reason: str
    error: str
    error_type: str


class Version(Struct, forbid_unknown_fields=True):
    version: str
