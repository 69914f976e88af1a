"""The whole way of one request: body, API, admission, images, pipeline, reply.

`APIS` lists the APIs; each says which requests it reads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any

from handlers.admission import Admission
from handlers.custom.formatters import FormattedStream, Formatters
from handlers.errors import InvalidParameter, InvalidRequest, NotFound
from handlers.generation_task import GenerationTask, cancels_this, refusal
from handlers.images.loader import ImageLoader
from handlers.parsers.base import AnswerFormats
from handlers.pipeline import Pipeline
from handlers.protocols.base import JSON, JSON_LINES, Answered, ErrorFormat, Gate, ServerContext, Task, in_thread_if
from handlers.protocols.body import SHORT_BYTES, read_body
from handlers.protocols.body_limits import MOST_TEXT_BYTES
from handlers.protocols.known_names import warning
from handlers.protocols.lmi.batch_transform import answer_lines, are_lines
from handlers.protocols.lmi.requests import LMI
from handlers.protocols.lmi.sagemaker import INVOKE_ROUTES
from handlers.protocols.openai.requests import OPENAI
from handlers.protocols.tgi.replies import TgiError
from handlers.protocols.tgi.requests import TGI
from handlers.protocols.tokens import TOKENS
from handlers.reply_stream import ReplyStream
from handlers.request import GenerationRequest, Incoming, Observer, Reply, RequestFacts
from handlers.request_checks import check_images
from handlers.timing_headers import timing_headers
from properties.settings import Settings

log = logging.getLogger(__name__)

Work = Callable[[dict[str, Any], Incoming, RequestFacts, bool], Awaitable[Reply]]
"""Its arguments: the body, its request, the facts to fill in, and whether the body is long."""

APIS = (TGI, OPENAI, LMI, TOKENS)
"""In order: the first API that claims a request gets it."""

ROUTES = tuple(route for api in APIS for route in api.routes)
"""All routes of all APIs."""

ERRORS_ANYWHERE = (TgiError,)
"""Structs of errors that a client may get on every route: TGI's own clients, which are known by a header."""

REQUEST_ID_HEADERS = (*(api.request_id for api in APIS if api.request_id), "x-request-id")
"""The headers in which a caller may name a request, the one that wins first."""

_CALLS = {name: call for api in APIS for name, call in api.calls.items()}
_FRAMES = {route: frame for api in APIS for route, frame in api.frames.items()}
_TIMED = frozenset(route.template for route in ROUTES if route.timed)

LONG_REPLY_BYTES = 2**20
"""A larger reply is written in a thread, so that other requests' tokens do not wait."""

_MOST_READ_HERE = 4096
"""The most items of a body that is parsed on the event loop, an object counted as eight; it takes milliseconds."""

_PARSER = ThreadPoolExecutor(1, "parse-body")
"""Parses long bodies one at a time: only one of them needs memory for its parse, and the C calls that let no other
thread run do not follow one another directly."""

_JSON_PER_LOGPROB = 64
"""Bytes, a little less than one log probability takes in a reply."""

HIGHEST_PRIORITY = 1000
"""The limit of a request's priority, in either direction."""


MOST_ALLOWED_TOKENS = 2**20
"""The most entries of allowed_token_ids, counted for each answer of a body. Some vocabularies have 260,000 tokens; a
million entries delay other requests by about half a second."""

MOST_BAD_WORDS = 2**14
"""The most bad words, counted for each prompt of a body. Each is tokenised with a space before it and without, so that
these take about as long."""

KEEP_ALIVE_SECONDS = 15.0
"""Seconds of silence in a stream of server-sent events after which a comment is sent."""


class Service:
    """Answers requests of every API with one model."""

    def __init__(
        self,
        pipeline: Pipeline,
        images: ImageLoader,
        settings: Settings,
        *,
        model_name: str,
        other_names: Collection[str] = (),
        formats: AnswerFormats | None = None,
        gates: Sequence[Gate] = (),
        formatters: Formatters | None = None,
        observer: Observer | None = None,
        keep_alive: float = KEEP_ALIVE_SECONDS,
    ) -> None:
        """Prepare to answer requests.

        Args:
            pipeline: Generates the answers.
            images: Loads the requests' images.
            settings: The options.
            model_name: Shown in replies to requests that name no model.
            other_names: Further names that requests may call the model by.
            formats: How answers with calls and reasoning are parsed.
            gates: They may answer requests of their APIs without the model.
            formatters: The user's own, called before and after each request.
            observer: Notified of what happens to requests.
            keep_alive: See `KEEP_ALIVE_SECONDS`.
        """
        self.pipeline = pipeline
        self.images = images
        self.settings = settings
        self.model_name = model_name
        self.names = frozenset((model_name, *other_names))
        self._formats = formats if formats is not None else AnswerFormats()
        self._gates = gates
        self._formatters = formatters
        self._observer = observer or Observer()
        self._keep_alive = keep_alive
        self.admission = Admission(settings.job_queue_size + settings.max_rolling_batch_size)
        self.long_texts = asyncio.Semaphore(1)
        """Held while a long text is tokenised."""

    @property
    def in_flight(self) -> int:
        """The number of answers that are generated, waited for, or still being read by their clients."""
        return self.admission.taken

    @property
    def free(self) -> int:
        """The number of further answers that would be admitted now."""
        return self.admission.free

    async def close(self) -> None:
        """Abort what is running, and close the engine. Never raises."""
        await self.pipeline.close()

    async def answer(self, incoming: Incoming) -> Reply:
        """Generate the reply to a body.

        A stream is returned together with its first token, so that any earlier failure has a status code of its own.
        """
        if incoming.route not in INVOKE_ROUTES or not are_lines(incoming.headers):
            return await self.reply(incoming, self._answer)
        facts = RequestFacts(incoming.request_id, incoming.route)
        try:
            return await answer_lines(
                incoming,
                lambda line: self.reply(line, partial(self._answer_line, incoming.request_id)),
                together=self.settings.max_rolling_batch_size,
                seconds=self.settings.predict_timeout,
                facts=facts,
            )
        except (Exception, asyncio.CancelledError) as error:
            return refusal(error, facts, error_format(incoming.route, incoming.headers), self._observer)

    async def call(self, action: str, incoming: Incoming) -> Reply:
        """Answer a request that does not generate text. action: a key of an API's `calls`."""
        return await _CALLS[action](self, incoming)

    def needs_no_place(self, route: str, size: int, content: bytes | None = None) -> bool:
        """Whether a body of this size, or this very body, may be answered without the model."""
        return any(route in gate.routes and gate.may_answer(size, content) for gate in self._gates)

    async def reply(self, incoming: Incoming, work: Work) -> Reply:
        """Return the reply that `work` makes of a body, or the refusal.

        It raises only when it is cancelled, and everything is given back in that case.
        """
        facts = RequestFacts(incoming.request_id, incoming.route, arrival=time.monotonic())
        keys: Collection[str] = ()
        try:
            long = _is_long(incoming.body)
            body = await self._parsed(incoming, long)
            keys = tuple(body)
            return await work(body, incoming, facts, long)
        except (Exception, asyncio.CancelledError) as error:
            written = error_format(incoming.route, incoming.headers, keys)
            reply = refusal(error, facts, written, self._observer)
            facts.total = time.monotonic() - facts.arrival
            return reply

    async def _parsed(self, incoming: Incoming, long: bool) -> dict[str, Any]:
        longest_text = max(MOST_TEXT_BYTES, 4 * self.settings.max_image_bytes // 3 + SHORT_BYTES)  # in base64
        context = self.pipeline.capabilities.max_model_len
        given = (incoming.take_body(), incoming.headers, context, longest_text)
        if not long:
            return read_body(*given)
        return await asyncio.get_running_loop().run_in_executor(_PARSER, read_body, *given)

    async def _answer(self, body: dict[str, Any], incoming: Incoming, facts: RequestFacts, long: bool) -> Reply:
        for gate in self._gates:
            if incoming.route not in gate.routes and gate.header not in incoming.headers:
                continue
            if (reply := gate.answer(body, incoming)) is not None:
                return reply
        if self._formatters is not None and self._formatters.reads:
            body = await self._formatters.read(body)
        task = await in_thread_if(long, self._task, body, incoming)
        body.clear()
        facts.model = task.requests[0].model
        if task.misspelt:
            log.warning("request %s: %s", incoming.request_id, " ".join(task.misspelt))
        incoming.parsed()
        return await self._run(task, facts, incoming.keep)

    async def _answer_line(
        self, request_id: str, body: dict[str, Any], incoming: Incoming, facts: RequestFacts, long: bool
    ) -> Reply:
        """Answer a line of a body, never as a stream, even if it asks for one. request_id: the whole body's."""
        facts.request_id = request_id
        body["stream"] = False
        body.pop("stream_options", None)
        return await self._answer(body, incoming, facts, long)

    @cached_property
    def context(self) -> ServerContext:
        """What holds for every request of this server."""
        capabilities = self.pipeline.capabilities
        return ServerContext(
            self.model_name,
            capabilities.default_sampling,
            self.settings.output_formatter,
            self.settings.tgi_compat,
            self.settings.trust_request_chat_template,
            capabilities.max_model_len,
            capabilities.special_token_ids,
            capabilities.special_tokens,
            self._formats,
            custom_output=self._formatters is not None and self._formatters.writes,
            embeddings=self.settings.enable_mm_embeds,
            chat_templates=capabilities.chat_templates,
        )

    def _task(self, body: dict[str, Any], incoming: Incoming) -> Task:
        capabilities = self.pipeline.capabilities
        task = read_task(body, self.context, incoming)
        _check_totals(task.requests)
        for request in task.requests:
            if request.adapter is not None and not capabilities.adapters:
                raise NotFound(f"there is no adapter {request.adapter[:80]!r}", param="adapters")
            if (constraint := request.constraint) is not None and not capabilities.structured_outputs:
                raise InvalidRequest(
                    f"{constraint.param}: this server cannot constrain answers; leave it out", param=constraint.param
                )
            self.check_images(sum(1 for _ in request.images()))
            priority = min(max(request.priority, -HIGHEST_PRIORITY), HIGHEST_PRIORITY)
            request.priority = priority if self.settings.request_priorities else 0
        in_images = sum(part.characters for request in task.requests for part in request.images())
        for request in task.requests:
            request.text_bytes = max(0, incoming.size - in_images)
        return task

    def check_images(self, count: int) -> None:
        """Raise InvalidRequest if a prompt may not have this many images."""
        most = self.settings.limit_mm_per_prompt.get("image", 1)
        limit = f'this server takes at most {most} (option.limit_mm_per_prompt={{"image": {most}}})'
        check_images(count, most, limit, accepted=self.pipeline.capabilities.images)

    async def _run(self, task: Task, facts: RequestFacts, keep: Callable[[int], None]) -> Reply:
        permit = self.admission.admit(sum(request.n for request in task.requests))
        formatters = self._formatters if self._formatters is not None and self._formatters.writes else None
        deadline = facts.arrival + self.settings.predict_timeout
        facts.stream = task.requests[0].stream
        generating = GenerationTask(task, permit, self.pipeline, self.images, facts, self._observer, deadline, keep)
        stream: ReplyStream | None = None
        try:
            async with generating.time_limit():
                if not facts.stream:
                    answered = await generating.answers()
                    size = _JSON_PER_LOGPROB * sum(map(_logprobs, answered))
                    body = await in_thread_if(size > LONG_REPLY_BYTES, task.writer.whole, answered)
                    if formatters is not None:
                        body = await formatters.write(body)
                else:
                    deltas = generating.deltas()
                    first = await anext(deltas)
                    stream = ReplyStream(
                        generating,
                        first,
                        deltas,
                        self._observer,
                        keep_alive=self._keep_alive,
                        read_timeout=self.settings.chunked_read_timeout,
                    )
            facts.status = 200
        except (Exception, asyncio.CancelledError) as error:
            if cancels_this(error):
                raise
            known = generating.failure(error)
            facts.status = known.status
            if known is error:
                raise
            raise known from error
        finally:
            if stream is None:
                await generating.close()
        headers = warning(task.misspelt)
        if facts.route in _TIMED:
            headers |= timing_headers(task.requests, self.pipeline.capabilities.compute_type, facts)
        if stream is not None:
            if formatters is not None:
                events = FormattedStream(stream, formatters, facts.request_id)
                return Reply(200, JSON_LINES, chunks=events, headers=headers, facts=facts)
            return Reply(200, task.writer.stream_type, chunks=stream, headers=headers, facts=facts)
        return Reply(200, JSON, body, headers=headers, facts=facts)


def error_format(route: str, headers: Mapping[str, str], keys: Collection[str] = ()) -> ErrorFormat:
    """Return the format of errors for a request. keys: those of its body, as soon as they are known."""
    return next(api.errors for api in APIS if api.claims(route, headers, keys))


def gates(settings: Settings) -> tuple[Gate, ...]:
    """Return the gates of a server, one for each API that has one."""
    return tuple(api.gate(settings) for api in APIS if api.gate is not None)


def read_task(body: dict[str, Any], server: ServerContext, incoming: Incoming) -> Task:
    """Read a body with the API that it belongs to. Raises InvalidRequest naming the field at fault."""
    route = incoming.route
    asked = (api.reads(body.keys(), route) for api in APIS if not api.reads_on or route in api.reads_on)
    read = next((found for found in asked if found is not None), None)
    if read is None:
        raise InvalidRequest("the body has neither messages, prompt nor inputs", param="messages")
    adapter = _named_adapter(incoming)
    if (frame := _FRAMES.get(route)) is None:
        return read(body, server, incoming, adapter)
    return frame(read, body, server, incoming, adapter)


def _named_adapter(incoming: Incoming) -> str | None:
    """Return the adapter that the request's head names."""
    for api in APIS:
        if api.adapter is not None and not incoming.headers.keys().isdisjoint(api.headers):
            return api.adapter(incoming)
    return incoming.query.get("adapter") or None


def _check_totals(requests: Sequence[GenerationRequest]) -> None:
    """Raise InvalidRequest if the requests of one body ask for too much together."""
    answers = sum(request.n for request in requests)
    sampling = requests[0].sampling
    allowed = sampling.allowed_token_ids or ()
    for name, size, times, of, most in (
        ("allowed_token_ids", len(allowed), answers, "answers", MOST_ALLOWED_TOKENS),
        ("bad_words", len(sampling.bad_words), len(requests), "prompts", MOST_BAD_WORDS),
    ):
        if size * times > most:
            raise InvalidParameter(
                name, f"has {size} entries, for {times} {of}; allowed: {most} for all of them together"
            )


def _logprobs(answered: Answered) -> int:
    """Return how many log probabilities a reply with this prompt and its answers may show."""
    lists = [answered.stats.prompt_logprobs or (), *(answer.logprobs for answer in answered.answers)]
    return sum(1 + len(position.top) for positions in lists for position in positions if position is not None)


def _is_long(body: bytes) -> bool:
    """Whether parsing the body would hold up the event loop for too long."""
    return len(body) > SHORT_BYTES or 8 * body.count(b"{") + body.count(b",") > _MOST_READ_HERE
