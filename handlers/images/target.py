"""Picture URLs taken apart once: what is checked here is, byte for byte, what is asked for."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from handlers.errors import ImageFetchFailed
from handlers.images.problem import PictureProblem

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
    """One hop's destination. `host` is lower-case ASCII without a final dot or an IPv6 literal's brackets."""

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
        """Where a redirect answered by this target leads, never from https to http. Raises PictureProblem."""
        try:
            target = parse_target(urljoin(f"{self.scheme}://{self.authority}{self.path}", location))
        except ValueError as error:
            raise PictureProblem("its URL is malformed", ImageFetchFailed) from error
        except PictureProblem as problem:
            raise PictureProblem(problem.reason, ImageFetchFailed) from problem
        if self.scheme == "https" and target.scheme == "http":
            raise PictureProblem("it would leave https for http, which is refused", ImageFetchFailed)
        return target


def parse_target(url: str) -> Target:
    """Reads an `http:` or `https:` URL. Any port is accepted, the fragment is dropped, spaces and other
    characters that may not stand in a path are percent-encoded.

    Raises PictureProblem for other schemes, user names and passwords, and malformed authorities.
    """
    check_scheme(url)
    if len(url) > MAX_URL_CHARACTERS:
        raise PictureProblem(f"its URL is longer than {MAX_URL_CHARACTERS} characters")
    try:
        parts = urlsplit(url)
        port = parts.port
        path = quote(parts.path, safe=KEPT_IN_PATH) or "/"
        if parts.query:
            path += "?" + quote(parts.query, safe=KEPT_IN_QUERY)
    except ValueError as error:
        raise PictureProblem("its URL is malformed") from error
    if "@" in parts.netloc:
        raise PictureProblem("its URL holds a user name or password, which is refused")
    if port == 0:
        raise PictureProblem("its URL names port 0")
    return Target(parts.scheme, _host(parts.hostname), port or DEFAULT_PORTS[parts.scheme], path)


def check_scheme(url: str) -> None:
    """Raises PictureProblem, with what to send instead, unless the URL starts with `http:` or `https:`."""
    scheme = SCHEME.match(url[:32])
    if scheme is not None and scheme[1].lower() in DEFAULT_PORTS:
        return
    if not url:
        raise PictureProblem("its URL is empty")
    if scheme is not None:
        raise PictureProblem(f"{scheme[1].lower()}: URLs are refused; send an http:, https: or data: URL")
    if BASE64.match(url[:256]):
        raise PictureProblem(
            "its URL has no scheme; if it is base64, write data:image/jpeg;base64, in front of it"
        )
    raise PictureProblem("its URL has no scheme; send an http:, https: or data: URL")


def canonical_host(name: str) -> str:
    """A host as `Target.host` has it: IDNA, lower case, no final dot; IPv6 compressed, without brackets.

    Raises ValueError.
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
        raise PictureProblem("its URL names no host")
    if "%" in name:
        raise PictureProblem("its URL's host has a percent sign, which is refused")
    try:
        return canonical_host(name)
    except ValueError as error:
        raise PictureProblem("its URL's host name is malformed") from error
