"""Which network addresses a picture may be fetched from."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from handlers.images.target import canonical_host

IPAddress = IPv4Address | IPv6Address

GLOBAL_UNICAST = IPv6Network("2000::/3")  # all that IANA has handed out; RFC 4291, section 2.4
NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
DOCUMENTATION = IPv6Network("3fff::/20")  # RFC 9637, newer than this Python's tables
V4_NOT_PUBLIC = (
    IPv4Network("192.0.0.0/24"),  # protocol assignments, RFC 6890; Python knows only parts of it
    IPv4Network("192.88.99.0/24"),  # 6to4 relays, RFC 7526
    IPv4Network("168.63.129.16/32"),  # Azure's host agent: metadata behind a global address
)


def is_public(address: IPAddress) -> bool:
    """True for globally reachable unicast addresses; an IPv4 address inside an IPv6 one is what counts."""
    if isinstance(address, IPv4Address):
        return (
            address.is_global
            and not address.is_multicast
            and not address.is_reserved
            and not any(address in network for network in V4_NOT_PUBLIC)
        )
    if address.scope_id is not None:
        return False
    carried = _carried(address)
    if carried is not None:
        return is_public(carried)
    return address in GLOBAL_UNICAST and address.is_global and address not in DOCUMENTATION


def _carried(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that packets end up at. Teredo is not here: `is_global` denies all of it."""
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


class AllowedPrivate:
    """The operator's exceptions: host names, addresses and networks (`option.image_fetch_allow_private`)."""

    def __init__(self, entries: Iterable[str]) -> None:
        """Raises ValueError for an entry that is none of these."""
        self.hosts: set[str] = set()
        self.networks: list[IPv4Network | IPv6Network] = []
        for entry in entries:
            try:
                self.networks.append(ipaddress.ip_network(entry.strip("[]"), strict=False))
            except ValueError:
                self.hosts.add(canonical_host(entry))

    def admits(self, host: str, address: IPAddress) -> bool:
        """Whether `host`, as the URL spells it, may be fetched from `address` although that is not public."""
        if host in self.hosts:
            return True
        candidates = [address]
        if isinstance(address, IPv6Address) and (carried := _carried(address)) is not None:
            candidates.append(carried)
        return any(candidate in network for candidate in candidates for network in self.networks)
