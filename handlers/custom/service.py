"""Passes requests to the user's own handler, and its answers back."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping

import msgspec

from handlers.admission import Admission, Permit
from handlers.custom.backend import CustomBackend, HandlerCall
from handlers.custom.messages import End, Head, Part
from handlers.errors import DeadlineExceeded, InvalidRequest, NotFound, ServingError
from handlers.generation_task import refusal
from handlers.protocols.base import JSON_LINES
from handlers.protocols.errors import error_reply, log_error, own_words_of
from handlers.protocols.lmi.batch_transform import execution_reply
from handlers.protocols.lmi.replies import LmiError
from handlers.protocols.lmi.sagemaker import request_properties
from handlers.request import Incoming, Observer, Reply, RequestFacts
from handlers.service import error_format
from properties.settings import Settings

_GRACE_SECONDS = 1.0
"""How long a handler may take to end a call whose time is up before its process is killed."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
_OURS = {
    "content-type", "content-length", "transfer-encoding", "connection", "keep-alive", "upgrade", "x-request-id",
}  # fmt: skip
"""Headers that a handler cannot set, or that are set elsewhere."""

_MAX_VALUE = 4096
_NOT_PASSED_ON = frozenset({"authorization", "cookie", "proxy-authorization"})


class CustomService:
    """Passes requests to the handler as they are, whatever their schema; see `handlers.service.Service`."""

    def __init__(self, backend: CustomBackend, settings: Settings, observer: Observer | None = None) -> None:
        self._backend = backend
        self._settings = settings
        self._observer = observer or Observer()
        self._admission = Admission(settings.job_queue_size + settings.max_rolling_batch_size)

    @property
    def in_flight(self) -> int:
        return self._admission.taken

    @property
    def free(self) -> int:
        return self._admission.free

    async def answer(self, incoming: Incoming) -> Reply:
        """Answer a request. It raises only when it is cancelled, and everything is given back in that case."""
        facts = RequestFacts(incoming.request_id, incoming.route)
        try:
            return await self._answer(incoming, facts)
        except (Exception, asyncio.CancelledError) as error:
            written = error_format(incoming.route, incoming.headers)
            return refusal(error, facts, written, self._observer)

    async def close(self) -> None:
        """End the handler's processes. Never raises."""
        await self._backend.close()

    async def call(self, action: str, incoming: Incoming) -> Reply:
        """Answer the calls that need no engine, and refuse the others."""
        if action == "execution":
            return execution_reply(self._settings.max_rolling_batch_size)
        if action == "adapters":
            raise InvalidRequest("the model's own handler answers here: no adapters can be managed")
        error = NotFound("the model's own handler answers here; it has no tokens to show")
        return error_reply(error, error_format(incoming.route, incoming.headers))

    def needs_no_place(self, route: str, size: int, content: bytes | None = None) -> bool:
        return False

    async def _answer(self, incoming: Incoming, facts: RequestFacts) -> Reply:
        incoming.parsed()
        permit = self._admission.admit(1)
        task = HandlerTask(permit, facts, self._observer, self._settings.predict_timeout)
        try:
            async with task.time_limit():
                task.call = await self._backend.call(_properties(incoming), incoming.body)
                head = await task.call.next()
                assert isinstance(head, Head)
                facts.status, facts.stream = head.status, head.streams
                body = b"" if head.streams else await task.call.rest()
        except BaseException as error:
            task.close()
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded from error
            raise
        if not head.streams:
            task.close()
        kind = next((v for n, v in head.properties.items() if n.lower() == "content-type"), "application/octet-stream")
        chunks = HandlerStream(task, kind) if head.streams else None
        return Reply(head.status, kind, body, chunks=chunks, headers=_headers(head.properties), facts=facts)


class HandlerTask:
    """One admitted request: its queue place, its time limit and its call, all of which `close` gives back."""

    def __init__(self, permit: Permit, facts: RequestFacts, observer: Observer, seconds: float) -> None:
        self.call: HandlerCall | None = None
        self.facts = facts
        self.observer = observer
        self._permit = permit
        self._began = time.monotonic()
        self._end = asyncio.get_running_loop().time() + seconds
        self._closed = False
        facts.arrival = self._began
        observer.on_admitted(facts)

    def time_limit(self) -> asyncio.Timeout:
        return asyncio.timeout_at(self._end)

    def first_part(self) -> None:
        if self.facts.first_token is None:
            self.facts.first_token = time.monotonic() - self._began
            self.observer.on_first_token(self.facts.first_token)

    def close(self) -> None:
        """Give everything back; safe to call twice. A handler that is still working has until the deadline."""
        if self._closed:
            return
        self._closed = True
        if self.call is not None:
            left = self._end - asyncio.get_running_loop().time()
            self.call.abandon(max(0.0, left) + _GRACE_SECONDS)
        self._permit.release()
        self.facts.total = time.monotonic() - self._began
        self.observer.on_finished(self.facts)


class HandlerStream:
    """The parts of a streamed answer. An error becomes a line or an event, if the content type has those."""

    def __init__(self, task: HandlerTask, content_type: str) -> None:
        self._task = task
        self._type = content_type.partition(";")[0].strip().lower()
        self._done = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        task = self._task
        assert task.call is not None
        if self._done:
            task.close()
            raise StopAsyncIteration
        try:
            async with task.time_limit():
                message = await task.call.next()
        except TimeoutError:
            return self._failed(DeadlineExceeded())
        except ServingError as error:
            return self._failed(error)
        if isinstance(message, End):
            task.close()
            raise StopAsyncIteration
        assert isinstance(message, Part)
        task.first_part()
        return message.data

    async def aclose(self) -> None:
        self._task.close()

    def _failed(self, error: ServingError) -> bytes:
        self._done = True
        facts = self._task.facts
        facts.error, facts.reason = error.kind, own_words_of(error)
        log_error(error, facts.request_id)
        self._task.observer.on_error(error.kind)
        line = msgspec.json.encode(LmiError.of(error))
        if self._type == JSON_LINES:
            return line + b"\n"
        if self._type == "text/event-stream":
            return b"data: " + line + b"\n\n"
        self._task.close()
        raise error


def _properties(incoming: Incoming) -> dict[str, str]:
    """Return the headers and the custom attributes, except secrets between client and server."""
    given = request_properties(incoming)
    told = {name: value for name, value in given.items() if name not in _NOT_PASSED_ON}
    told["requestId"] = incoming.request_id
    if incoming.model is not None:
        told["model_name"] = incoming.model
    return told


def _headers(properties: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value[:_MAX_VALUE]
        for name, value in properties.items()
        if _NAME.fullmatch(name) and name.lower() not in _OURS
    }
