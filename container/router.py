"""Finds the route of a request.

Clients append paths of their own to the address that they are given. A path built from an address that ends in `/v1`,
`/invocations` or `/generate`, or with a slash too many, finds the route that the client means.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from container.routes import ROUTES, ROUTES_OF_SEVERAL
from handlers.errors import NotFound, ServingError
from handlers.protocols.base import Route


class MethodNotAllowed(ServingError):
    """The path has routes, but none for this method.

    Attributes:
        route: The first one of the path.
        allowed: The methods of all of them.
    """

    status = 405
    kind = "method_not_allowed"

    def __init__(self, method: str, routes: tuple[Route, ...]) -> None:
        self.allowed = tuple(one for route in routes for one in route.methods)
        super().__init__(f"{method[:20]} is not allowed here; use {' or '.join(self.allowed)}")
        self.route = routes[0]


@dataclass(frozen=True, slots=True)
class Match:
    """A route, and the names of a model and of an adapter in the path; "" if there are none."""

    route: Route
    name: str = ""
    adapter: str = ""


_NAMES = {"{name}": "(?P<name>.+)", "{adapter}": "(?P<adapter>[^/]+)"}
_SLASHES = re.compile(r"//+")


class Router:
    """A table of routes, which finds the route of a request."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)
        paths: dict[str, tuple[Route, ...]] = {}
        for route in self.routes:
            paths[route.path] = (*paths.get(route.path, ()), route)
        self._appended = {route.path: route for route in self.routes if route.appended}
        self._plain = {path: found for path, found in paths.items() if "{" not in path}
        self._named = [(_pattern(path), found) for path, found in paths.items() if "{" in path]

    def find(self, path: str, method: str) -> Match:
        """Return the route of a request.

        Raises:
            NotFound: There is no route with this path.
            MethodNotAllowed: The path has routes for other methods only.
        """
        found, names = self._at(_SLASHES.sub("/", path).rstrip("/") or "/")
        if not found:
            raise NotFound(
                "no such route; POST /v1/chat/completions, /v1/completions, /invocations, /generate and / answer "
                "requests; GET /openapi.json lists all routes"
            )
        for route in found:
            if method in route.methods:
                return Match(route, **names)
        raise MethodNotAllowed(method, found)

    def _at(self, path: str) -> tuple[tuple[Route, ...], dict[str, str]]:
        for tail, route in self._appended.items():
            if path.endswith(tail) and path != tail:
                found, names = self._listed(path.removesuffix(tail))
                return ((route,), names) if any(one.action == "answer" for one in found) else ((), {})
        return self._listed(path)

    def _listed(self, path: str) -> tuple[tuple[Route, ...], dict[str, str]]:
        if path in self._plain:
            return self._plain[path], {}
        for pattern, routes in self._named:
            if match := pattern.fullmatch(path):
                return routes, match.groupdict()
        return (), {}


def _pattern(path: str) -> re.Pattern[str]:
    for name, group in _NAMES.items():
        path = path.replace(name, group)
    return re.compile(path)


ONE, SEVERAL = Router(ROUTES), Router(ROUTES_OF_SEVERAL)
"""The routers of a server of one model and of a server of several models."""
