"""The HTTP application: it finds the route of each request, checks its key, answers it, and logs it in one line.

Clients append paths of their own to the address that they are given. A path built from an address that ends in `/v1`,
`/invocations` or `/generate`, or with a slash too many, finds the route that the client means (`Router`).

`Keys` decides who may call the server, and `Cors` which web pages may call it from a browser.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import parse_qs

from pydantic import SecretStr

from container.bodies import Bodies, Body, declared_size, has_body
from container.exchange import Call, ClientGone, Exchange, Receive, Scope, Send, request_id
from container.logs import LONG_BYTES, Refusals, log_answer, log_prompt
from container.metrics import Metrics
from container.models.models import REGISTRY
from container.routes import ROUTES, ROUTES_OF_SEVERAL, LightReplies
from container.state import Answers, ServerState
from handlers.errors import (
    DeadlineExceeded,
    InsufficientStorage,
    NotFound,
    ServingError,
    Unavailable,
    overloaded,
)
from handlers.protocols.base import JSON, Route
from handlers.protocols.errors import client_error, error_reply, own_words_of
from handlers.protocols.lmi.batch_transform import MOST_SECONDS, are_lines
from handlers.protocols.lmi.sagemaker import INVOKE_ROUTES
from handlers.request import Incoming, Reply
from handlers.service import error_format
from properties.configuration import Configuration

logger = logging.getLogger("container.request")


_UNCACHED = {"cache-control": "no-cache, no-store, must-revalidate, private", "pragma": "no-cache"}
_GRACE_SECONDS = 5.0
"""Extra time in which the handlers can report a timeout themselves."""

METHODS = "GET, POST, OPTIONS"
_PREFLIGHT_SECONDS = "86400"
_HEADER_NAMES = re.compile(r"[\w!#$%&'*+.^`|~-]+(?:\s*,\s*[\w!#$%&'*+.^`|~-]+)*", re.ASCII)
_MOST_HEADER_CHARACTERS = 2000
"""Characters of all header names in one preflight request."""

_DROPPED_BYTES = 64 * 1024
"""The most bytes of a refused request's body that are read and discarded to keep the connection."""


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


class Unauthorized(ServingError):
    """The request does not carry one of the server's keys."""

    status = 401
    kind = "authentication_failed"


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
"""The routes of a server of one model, and those of a server of several."""


class App:
    """The ASGI application.

    Attributes:
        calls: The requests with a body that are being answered.
        light: Replies to requests without bodies.
        idle: Set while `calls` is empty.
        bodies: The memory of the requests' bodies.
    """

    def __init__(self, configuration: Configuration, state: ServerState, metrics: Metrics) -> None:
        self._state = state
        self._metrics = metrics
        self.calls: set[Call] = set()
        self.light = LightReplies(state, metrics, self._service)
        self.idle = asyncio.Event()
        self.idle.set()
        self.bodies = metrics.bodies = Bodies()
        self._refusals = Refusals()
        self.configure(configuration)

    def configure(self, configuration: Configuration) -> None:
        """Apply a configuration. It is called again if the model's files contain options."""
        self._settings = configuration.settings
        self.light.configure(configuration)
        self._accepted = configuration.accepted_names
        self._cors = Cors(configuration.settings.cors_allowed_origin)
        self._keys = Keys(configuration.settings.api_key)
        self._router = SEVERAL if configuration.settings.multi_model else ONE
        self.bodies.limit = max(self._settings.request_memory_mb * 2**20, self._settings.max_request_size)

    def on_malformed(self, status: int) -> None:
        """Count input that was not a request and was answered with `status`."""
        self._metrics.on_http("unknown", status)

    def _refusal(self, route: Route, call: Call) -> ServingError | None:
        """Return the reason not to read a request's body, if there is one."""
        if route.light or self._state.phase != "serving" or (service := self._state.service) is None:
            return None
        declared = declared_size(call.headers)
        if call.crowded:
            return overloaded("too many connections are open")
        full = route.queued and service.free <= self.bodies.reserved
        if full and not service.needs_no_place(route.template, declared):
            return overloaded()
        if declared <= self._settings.max_request_size and not self.bodies.fits(declared):
            return self.bodies.overloaded()
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        call = Call(
            method=scope["method"],
            path=scope["path"],
            query=scope["query_string"].decode("latin-1"),
            headers=headers,
            receive=receive,
            exchange=Exchange(receive, send),
            request_id=request_id(headers, self._settings.request_id_header_key),
            crowded=scope.get("state", {}).get("crowded", False),
        )
        try:
            await self._respond(call)
        except ClientGone:
            call.exchange.ending = "client_gone"
            call.exchange.status = call.exchange.status or scope.get("state", {}).get("refused", 0)
        except Exception as error:
            await self._fail(call, error)
        self._note(call)

    async def _respond(self, call: Call) -> None:
        preflight = self._cors.preflight(call.method, call.headers)
        if preflight is not None:
            await self._reply(call, Reply(200, JSON, b"{}\n", headers=preflight))
            return
        try:
            match = self._router.find(call.path, call.method)
        except MethodNotAllowed as error:
            call.route = error.route
            raise
        call.route = match.route
        if not match.route.open and not self._keys.admit(call.headers):
            raise Unauthorized("send the server's key as `Authorization: Bearer KEY`")
        if (refusal := self._refusal(match.route, call)) is not None:
            self._metrics.on_error(refusal.kind)
            self._refusals.add(refusal)
            call.logged = True
            await self._reply(call, error_reply(refusal, error_format(call.template, call.headers)))
            return
        if match.route.light:
            reply = await self.light.reply(call, match.route.action, match.name)
            await self._reply(call, reply)
            return
        named = match.name
        if not named and match.route.action != REGISTRY:
            named = parse_qs(call.query).get("model_name", [""])[0]
        call.model = self._known(named) if named else None
        await self._work(call, match)

    def _service(self) -> Answers:
        """Return the service. Raises Unavailable while nothing can be answered."""
        if self._state.phase != "serving":
            raise Unavailable(f"not ready: {self._state.reason}", retry_after=5)
        if self._state.service is None:
            raise Unavailable(self._state.reason)
        return self._state.service

    async def _work(self, call: Call, match: Match) -> None:
        """Answer a request that has a body and needs the model."""
        service, settings, route = self._service(), self._settings, match.route
        work = service.answer if route.action == "answer" else partial(service.call, route.action)
        longest = settings.predict_timeout
        if route.action == REGISTRY:
            longest = settings.model_loading_timeout
        elif call.template in INVOKE_ROUTES and are_lines(call.headers):
            longest = max(longest, MOST_SECONDS)
        self.calls.add(call)
        self.idle.clear()
        body = Body(self.bodies, call.headers, settings.max_request_size, settings.predict_timeout)
        try:
            size = declared_size(call.headers)
            if route.queued and not service.needs_no_place(call.template, size):
                self._reserve_place(body)
            content = await body.read(call.receive)
            call.body_read = True
            if route.queued and not service.needs_no_place(call.template, size, content):
                self._reserve_place(body)
            if settings.log_prompts:
                if len(content) > LONG_BYTES:
                    await asyncio.to_thread(log_prompt, call.request_id, content)
                else:
                    log_prompt(call.request_id, content)
            incoming = Incoming(
                call.template,
                content,
                call.headers,
                call.request_id,
                call.model,
                body.end_reservation,
                body.keep,
                method=call.method,
                query=call.parameters(),
                adapter=match.adapter,
            )
            answering = self._answer(call, work(incoming))
            del content, incoming  # otherwise they would be held until the reply is sent
            await call.exchange.run(
                answering,
                self._headers(call),
                longest=longest + _GRACE_SECONDS,
                pause=settings.chunked_read_timeout,
            )
        finally:
            body.release()
            self.calls.discard(call)
            if not self.calls:
                self.idle.set()
        if call.exchange.status == 0 and call.exchange.ending == "overdue":
            raise DeadlineExceeded("the request's time is up (predict_timeout); ask for less or raise it")
        if call.exchange.status == 0 and call.exchange.ending == "shutdown":
            raise Unavailable("the server stopped before the answer was complete; send it again", retry_after=5)

    def _reserve_place(self, body: Body) -> None:
        """Reserve a place in the queue, unless one is reserved; a slow body loses it. Raises Overloaded."""
        if body.reserved:
            return
        if self._service().free <= self.bodies.reserved:
            raise overloaded()
        body.reserve_place()

    async def _answer(self, call: Call, answering: Awaitable[Reply]) -> Reply:
        reply = await answering
        call.facts, call.logged = reply.facts, reply.logged
        if self._settings.log_prompts:
            log_answer(call.request_id, reply)
        return reply

    def _known(self, path: str) -> str:
        """Return the model that a path names, `NAME` or `NAME/VERSION`. Raises NotFound with LMI's message."""
        if self._settings.multi_model:
            self._service()  # Before the server is ready, no model is known.
        models = self._state.several
        accepted = self._accepted if models is None else models.names
        for name in (path, path.rpartition("/")[0]):
            if name in accepted:
                return name
        raise NotFound(f"Model or workflow not found: {path[:200]}")

    async def _reply(self, call: Call, reply: Reply, close: bool = False) -> None:
        await call.exchange.send(reply, self._headers(call), close)

    def _headers(self, call: Call) -> dict[str, str]:
        headers = {**_UNCACHED, "x-request-id": call.request_id, **self._cors.headers(call.headers)}
        unread = not call.body_read and _is_long(call.headers)
        if self._state.phase == "draining" or call.crowded or unread:
            headers["connection"] = "close"
        return headers

    async def _fail(self, call: Call, error: Exception) -> None:
        """Answer an error that no handler turned into a reply. A reply that has begun can only be cut off."""
        known = client_error(error, call.request_id)
        call.error, call.reason = known.kind, own_words_of(known)
        self._metrics.on_error(known.kind)
        if known.status >= 500 and not isinstance(error, Unavailable | InsufficientStorage):
            logger.error("the request failed", exc_info=error, extra={"facts": {"request_id": call.request_id}})
        if call.exchange.status != 0:
            return
        reply = error_reply(known, error_format(call.path if call.route is None else call.template, call.headers))
        if isinstance(error, MethodNotAllowed):
            reply.headers["Allow"] = ", ".join(error.allowed)
        elif isinstance(error, Unauthorized):
            reply.headers["WWW-Authenticate"] = "Bearer"
        await self._reply(call, reply, close=not call.body_read and has_body(call.headers))

    def _note(self, call: Call) -> None:
        """Count the request and log its line, which never contains its prompt, its answer or its images."""
        exchange = call.exchange
        finished = self._metrics.facts.pop(call.request_id, None)
        facts = call.facts or finished
        status = exchange.status or (499 if exchange.ending == "client_gone" else 500)
        self._metrics.on_http(call.template, status)
        if (call.logged and call.error is None) or (call.route is not None and call.route.light and status != 401):
            return
        logger.info("request", extra={"facts": call.line(status, facts)})


def _is_long(headers: Mapping[str, str]) -> bool:
    """Whether the body is, or may be, too long to be discarded if the request is answered without it."""
    return "transfer-encoding" in headers or "expect" in headers or declared_size(headers) > _DROPPED_BYTES


class Keys:
    """The keys that the server accepts: one, or several as a JSON list of strings; with None no key is needed."""

    def __init__(self, secret: SecretStr | None) -> None:
        texts = [] if secret is None else _several(secret.get_secret_value())
        self._digests = [_digest(text.encode()) for text in texts]

    def admit(self, headers: Mapping[str, str]) -> bool:
        """Whether a valid `Authorization: Bearer KEY` is present; every wrong key takes the same time.

        Args:
            headers: Decoded as latin-1, so that their bytes can be restored.
        """
        if not self._digests:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        sent = _digest(given.strip().encode("latin-1", "replace"))
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(sent, digest)
        return found and scheme.lower() == "bearer"


def _several(text: str) -> list[str]:
    try:
        listed = json.loads(text)
    except ValueError:
        return [text]
    if isinstance(listed, list) and listed and all(isinstance(key, str) and key for key in listed):
        return listed
    return [text]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Cors:
    """The web pages that may call the server.

    Origins are written as browsers send them, "https://app.example", or "*" for any page. Credentials that a browser
    adds by itself are never allowed, so that no page can use another's key.
    """

    def __init__(self, origins: Sequence[str]) -> None:
        self._any = "*" in origins
        self._origins = frozenset(origins)

    def headers(self, asked: Mapping[str, str]) -> dict[str, str]:
        """The CORS headers of any reply. asked: the request's headers, names in lower case."""
        if not self._origins:
            return {}
        origin = asked.get("origin")
        shown = {} if self._any else {"vary": "origin"}
        if origin is None or not (self._any or origin in self._origins):
            return shown
        allowed = "*" if self._any else origin
        return {**shown, "access-control-allow-origin": allowed, "access-control-expose-headers": "*"}

    def preflight(self, method: str, asked: Mapping[str, str]) -> dict[str, str] | None:
        """The headers that answer a browser's preflight request; None for any other request."""
        if method != "OPTIONS" or "access-control-request-method" not in asked or not self._origins:
            return None
        names = asked.get("access-control-request-headers", "")
        found = {"access-control-allow-methods": METHODS, "access-control-max-age": _PREFLIGHT_SECONDS}
        if len(names) <= _MOST_HEADER_CHARACTERS and _HEADER_NAMES.fullmatch(names):
            found["access-control-allow-headers"] = names
        return found
