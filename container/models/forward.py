"""Passes a request on to the server of its model, and the reply back, whole or as it arrives."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from urllib.parse import quote, urlencode

import httpcore

from handlers.errors import Unavailable
from handlers.protocols.base import JSON
from handlers.request import Incoming, Reply
from properties.model import LMI_NAME

_NOT_SENT = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers that are meant for this server only."""

_NOT_RETURNED = frozenset(
    {
        "cache-control",
        "connection",
        "content-length",
        "content-type",
        "date",
        "keep-alive",
        "pragma",
        "transfer-encoding",
        "x-request-id",
    }
)
"""Headers that this server sets itself."""

_GONE = (httpcore.NetworkError, httpcore.ProtocolError)

_KEEP_ALIVE_SECONDS = 60.0
"""Shorter than the model's server keeps an idle connection, so that no request meets one that is being closed."""


class ModelClient:
    """The connections to one model's server."""

    def __init__(self, path: str, id_header: str) -> None:
        """path: of the Unix socket. id_header: the header in which its server reads a request's id."""
        self._pool = httpcore.AsyncConnectionPool(
            uds=path, max_connections=None, max_keepalive_connections=64, keepalive_expiry=_KEEP_ALIVE_SECONDS
        )
        self._id_header = id_header

    async def ask(self, incoming: Incoming, ended: Callable[[], None]) -> Reply:
        """Send a request and return the reply. If this is cancelled or a stream is closed, the server is told.

        Args:
            incoming: The request; its body is taken.
            ended: Called when the reply is complete, or has failed; not if this raises.

        Raises:
            Unavailable: The server is gone.
        """
        path = incoming.route.replace("{model}", LMI_NAME).replace("{adapter}", quote(incoming.adapter, safe=""))
        query = {name: value for name, value in incoming.query.items() if name != "model_name"}
        headers = {name: value for name, value in incoming.headers.items() if name not in _NOT_SENT}
        headers |= {"host": "model", "content-length": str(incoming.size), self._id_header: incoming.request_id}
        request = httpcore.Request(
            incoming.method,
            "http://model" + path + ("?" + urlencode(query) if query else ""),
            headers=[(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
            content=_body(incoming) if incoming.size else None,
        )
        try:
            response = await self._pool.handle_async_request(request)
            received = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
            reply = Reply(
                response.status,
                received.get("content-type", JSON),
                headers={
                    name: value
                    for name, value in received.items()
                    if name not in _NOT_RETURNED and not name.startswith("access-control-")
                },
                logged=True,
            )
            if "content-length" not in received:
                reply.chunks = _Stream(response, ended)
                return reply
            reply.body = await response.aread()
            await response.aclose()
        except _GONE as error:
            raise Unavailable("the model's server ended; send the request again", retry_after=1) from error
        ended()
        return reply

    async def read(self, path: str) -> str:
        """Return what a GET answers. Raises Unavailable."""
        try:
            response = await self._pool.request("GET", "http://model" + path, headers={"host": "model"})
        except _GONE as error:
            raise Unavailable("the model's server ended") from error
        return response.content.decode()

    async def close(self) -> None:
        await self._pool.aclose()


async def _body(incoming: Incoming) -> AsyncIterator[bytes]:
    """Yield the body, which is not kept here once it has been sent."""
    yield incoming.take_body()
    incoming.keep(0)


class _Stream:
    """The parts of a streamed reply."""

    def __init__(self, response: httpcore.Response, ended: Callable[[], None]) -> None:
        self._response = response
        self._parts = response.aiter_stream()
        self._ended: Callable[[], None] | None = ended

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._parts)
        except _GONE as error:
            raise Unavailable("the model's server ended; send the request again") from error

    async def aclose(self) -> None:
        ended, self._ended = self._ended, None
        if ended is not None:
            try:
                await self._response.aclose()
            finally:
                ended()
