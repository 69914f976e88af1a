"""Host names and addresses, which options and URLs write in many ways, in one form."""

from __future__ import annotations

import ipaddress
import re

MAX_HOST_CHARACTERS = 253
HOST_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")


def canonical_host(name: str) -> str:
    """Return a host in one form: IDNA, lower case, no final dot; IPv6 compressed, without brackets.

    Raises:
        ValueError: It is not a host name.
    """
    try:
        if ":" in name:
            return str(ipaddress.IPv6Address(name.removeprefix("[").removesuffix("]")))
        if len(name) <= MAX_HOST_CHARACTERS:
            ascii_name = name.encode("idna").decode("ascii").lower().removesuffix(".")
            if HOST_NAME.fullmatch(ascii_name):
                return ascii_name
    except ValueError:  # IPv6Address's own says nothing of host names, and IDNA's nothing of this one
        pass
    raise ValueError(f"{name[:MAX_HOST_CHARACTERS]!r} is not a host name")
