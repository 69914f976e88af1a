"""Where images may be fetched from: which URLs and which addresses.

A URL is parsed once, so that what is checked is what is requested.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from urllib.parse import quote, urljoin, urlsplit

from handlers.errors import ImageFetchFailed
from handlers.images import ImageProblem
from properties.hosts import canonical_host

Resolver = Callable[[str, int], Sequence[str]]

MAX_ADDRESSES = 4
MAX_URL_CHARACTERS = 8192
DEFAULT_PORTS = {"http": 80, "https": 443}
SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*):")
BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]{32,}")
KEPT_IN_PATH = "/%:@!$&'()*+,;=-._~"  # everything that RFC 3986 allows; a stray % is left as it is
KEPT_IN_QUERY = KEPT_IN_PATH + "?"


@dataclass(frozen=True, slots=True)
class Target:
    """Destination of one request.

    Attributes:
        scheme: "http" or "https".
        host: Lower-case ASCII, without a final dot and without the brackets of an IPv6 literal.
        port: Port of the host.
        path: Path and query.
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The value of the `Host` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def follow(self, location: str) -> Target:
        """Return the target of a redirect, which may not lead from https to http.

        Raises:
            ImageProblem: The location cannot be followed.
        """
        try:
            target = parse_target(urljoin(f"{self.scheme}://{self.authority}{self.path}", location))
        except ValueError as error:
            raise ImageProblem("its URL is malformed", ImageFetchFailed) from error
        except ImageProblem as problem:
            raise ImageProblem(problem.reason, ImageFetchFailed) from problem
        if self.scheme == "https" and target.scheme == "http":
            raise ImageProblem("it would leave https for http, which is refused", ImageFetchFailed)
        return target


def parse_target(url: str) -> Target:
    """Parse an `http:` or `https:` URL.

    Any port is accepted, the fragment is dropped, and spaces and other characters that are not allowed in a
    path are percent-encoded.

    Raises:
        ImageProblem: The URL has another scheme, a user name or password, or a malformed authority.
    """
    check_scheme(url)
    if len(url) > MAX_URL_CHARACTERS:
        raise ImageProblem(f"its URL is longer than {MAX_URL_CHARACTERS} characters")
    try:
        parts = urlsplit(url)
        port = parts.port
        path = quote(parts.path, safe=KEPT_IN_PATH) or "/"
        if parts.query:
            path += "?" + quote(parts.query, safe=KEPT_IN_QUERY)
    except ValueError as error:
        raise ImageProblem("its URL is malformed") from error
    if "@" in parts.netloc:
        raise ImageProblem("its URL holds a user name or password, which is refused")
    if port == 0:
        raise ImageProblem("its URL names port 0")
    return Target(parts.scheme, _host(parts.hostname), port or DEFAULT_PORTS[parts.scheme], path)


def check_scheme(url: str) -> None:
    """Check that the URL starts with `http:` or `https:`.

    Raises:
        ImageProblem: It does not; the message says what to send instead.
    """
    scheme = SCHEME.match(url[:32])
    if scheme is not None and scheme[1].lower() in DEFAULT_PORTS:
        return
    if not url:
        raise ImageProblem("its URL is empty")
    if scheme is not None:
        raise ImageProblem(f"{scheme[1].lower()}: URLs are refused; send an http:, https: or data: URL")
    if BASE64.match(url[:256]):
        raise ImageProblem("its URL has no scheme; if it is base64, write data:image/jpeg;base64, in front of it")
    raise ImageProblem("its URL has no scheme; send an http:, https: or data: URL")


def _host(name: str | None) -> str:
    if not name:
        raise ImageProblem("its URL names no host")
    if "%" in name:
        raise ImageProblem("its URL's host has a percent sign, which is refused")
    try:
        return canonical_host(name)
    except ValueError as error:
        raise ImageProblem("its URL's host name is malformed") from error


IPAddress = IPv4Address | IPv6Address

GLOBAL_UNICAST = IPv6Network("2000::/3")  # all that IANA has assigned; RFC 4291, section 2.4
NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
DOCUMENTATION = IPv6Network("3fff::/20")  # RFC 9637, newer than this Python's tables
V4_NOT_PUBLIC = (
    IPv4Network("192.0.0.0/24"),  # protocol assignments, RFC 6890; Python knows only parts of it
    IPv4Network("192.88.99.0/24"),  # 6to4 relays, RFC 7526
    IPv4Network("168.63.129.16/32"),  # Azure's host agent: metadata behind a global address
)


def is_public(address: IPAddress) -> bool:
    """Tell whether an address is globally reachable unicast; an IPv4 address inside an IPv6 address is what counts."""
    if isinstance(address, IPv4Address):
        return (
            address.is_global
            and not address.is_multicast
            and not address.is_reserved
            and not any(address in network for network in V4_NOT_PUBLIC)
        )
    if address.scope_id is not None:
        return False
    embedded = _embedded_ipv4(address)
    if embedded is not None:
        return is_public(embedded)
    return address in GLOBAL_UNICAST and address.is_global and address not in DOCUMENTATION


def _embedded_ipv4(address: IPv6Address) -> IPv4Address | None:
    """Return the IPv4 address that packets end up at. Teredo is missing because `is_global` denies all of it."""
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


class AllowedPrivate:
    """The operator's exceptions: host names, addresses and networks (`option.image_fetch_allow_private`)."""

    def __init__(self, entries: Iterable[str]) -> None:
        """Parse the entries. Raises ValueError for one that is neither a host name nor an address or a network."""
        self.hosts: set[str] = set()
        self.networks: list[IPv4Network | IPv6Network] = []
        for entry in entries:
            try:
                self.networks.append(ipaddress.ip_network(entry.strip("[]"), strict=False))
            except ValueError:
                self.hosts.add(canonical_host(entry))

    def admits(self, host: str, address: IPAddress) -> bool:
        """Tell whether `host`, as the URL spells it, may be fetched from `address` although it is not public."""
        if host in self.hosts:
            return True
        candidates = [address]
        if isinstance(address, IPv6Address) and (embedded := _embedded_ipv4(address)) is not None:
            candidates.append(embedded)
        return any(candidate in network for candidate in candidates for network in self.networks)


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host in the order in which the system would try them. Blocks; raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def checked(host: str, found: Sequence[str], allowed: AllowedPrivate) -> list[str]:
    """Return the addresses of a host that may be connected to.

    Raises:
        ImageProblem: An address is not public, or there is none.
    """
    for text in found:
        address = ipaddress.ip_address(text)
        if not is_public(address) and not allowed.admits(host, address):
            raise ImageProblem(
                "its host's address is not public; send the image as a data: URL, or have the operator "
                "allow the host with option.image_fetch_allow_private"
            )
    if not found:
        raise ImageProblem("its host name cannot be resolved", ImageFetchFailed)
    return list(found[:MAX_ADDRESSES])
