"""Parses image URLs once: what is checked here is, byte for byte, what is requested."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from handlers.errors import ImageFetchFailed
from handlers.images.problem import ImageProblem

MAX_URL_CHARACTERS = 8192
DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_HOST_CHARACTERS = 253
HOST_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
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
        raise ImageProblem(
            "its URL has no scheme; if it is base64, write data:image/jpeg;base64, in front of it"
        )
    raise ImageProblem("its URL has no scheme; send an http:, https: or data: URL")


def canonical_host(name: str) -> str:
    """Return a host in the form of `Target.host`: IDNA, lower case, no final dot; IPv6 compressed, without brackets.

    Raises:
        ValueError: It is not a host name.
    """
    if ":" in name:
        return str(ipaddress.IPv6Address(name.removeprefix("[").removesuffix("]")))
    if len(name) <= MAX_HOST_CHARACTERS:
        ascii_name = name.encode("idna").decode("ascii").lower().removesuffix(".")
        if HOST_NAME.fullmatch(ascii_name):
            return ascii_name
    raise ValueError(f"not a host name: {name[:MAX_HOST_CHARACTERS]!r}")


def _host(name: str | None) -> str:
    if not name:
        raise ImageProblem("its URL names no host")
    if "%" in name:
        raise ImageProblem("its URL's host has a percent sign, which is refused")
    try:
        return canonical_host(name)
    except ValueError as error:
        raise ImageProblem("its URL's host name is malformed") from error
