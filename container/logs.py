"""The log on standard output, as text or JSON: one event a line, even if clients send line breaks."""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import re
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler, QueueListener
from typing import Any, Literal, TextIO

import msgspec

from handlers.errors import ServingError
from handlers.progress import ERASE
from handlers.protocols.body_limits import check_body
from handlers.request import Reply

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

_OURS = ("container", "handlers", "engine", "processes", "properties")
"""The loggers with the configured level; libraries never log below `info`."""

WRITTEN = "container.written"
"""The logger of lines that a child process has written in the form of this log already."""

_MOST_WAITING = 20_000
"""Lines that may wait for a slow reader of the output; more are dropped, so that the server never waits."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN = re.compile(r"[\w.:/@+-]+", re.ASCII)

_requests = logging.getLogger("container.request")
_prompts = logging.getLogger("container.prompts")

_REFUSALS_SECONDS = 1.0
"""The time between two lines that count the requests refused in between."""

LONG_BYTES = 2**16
"""A longer body is prepared for the log in a thread."""

_SHOWN = 32_768
"""Characters of a body, and bytes of an answer, that are logged."""

LINK = re.compile(r"(?:data|https?|s3):[^\s)\"'<>]+", re.IGNORECASE)
_LINK_END = re.compile(r"[\s)\"'<>]")
_SCHEME = 8
"""Longer than the beginning of any link, in characters."""

WINDOW = 2**16
"""Characters that are searched for a link in one step."""


def one_line(text: str) -> str:
    """Return the text with control characters and line breaks written as escapes."""
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), text)


class LineFormatter(logging.Formatter):
    """Makes the lines of a record: facts are in its `facts`, an exception in its `exc_info`.

    As text: `TIME LEVEL logger: message key=value ...`, and a traceback's lines, each marked with `  | `. As JSON: one
    object, with a traceback in its field `traceback`.
    """

    def __init__(self, form: LogFormat, model: str | None) -> None:
        super().__init__()
        self._form = form
        self._model = model

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.name == WRITTEN:
            return message
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        head = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": message,
        }
        given = {"model": self._model, **getattr(record, "facts", {})}
        facts = {name: value for name, value in given.items() if value is not None}
        trace = _trace(record)
        if self._form == "json":
            shown = {"traceback": "\n".join(trace)} if trace else {}
            return json.dumps({**head, **facts, **shown}, default=str)
        words = [f"{head['time']} {record.levelname} {record.name}: {one_line(message)}"]
        words += [f"{name}={_text(value)}" for name, value in facts.items()]
        return "\n".join([" ".join(words), *(f"  | {one_line(line)}" for line in trace)])


def _trace(record: logging.LogRecord) -> list[str]:
    if not record.exc_info or record.exc_info[0] is None:
        return []
    lines = traceback.format_exception(*record.exc_info)
    return [line for block in lines for line in block.rstrip("\n").split("\n")]


class _Handler(logging.StreamHandler[TextIO]):
    """Writes a record whose `passing` is true as a line of a terminal that the next record replaces."""

    _over = ""

    def emit(self, record: logging.LogRecord) -> None:
        passing = getattr(record, "passing", False)
        try:
            if self._over:
                self.stream.write(self._over)
            self._over = ERASE if passing else ""
            if passing:
                columns = shutil.get_terminal_size().columns
                self.stream.write(one_line(record.getMessage())[: columns - 1])
                self.flush()
        except Exception:
            self.handleError(record)
        if not passing:
            super().emit(record)


def on_terminal() -> bool:
    """Whether the log is written to a terminal."""
    return sys.stdout.isatty()


class _Queue(QueueHandler):
    """Passes records on unchanged, since a thread of this process writes them."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            return


@contextmanager
def logging_to(
    stream: TextIO | None = None, form: LogFormat = "text", level: LogLevel = "info", model: str | None = None
) -> Iterator[None]:
    """Write the whole program's log to a stream (standard output) while the context is open.

    A thread writes it, so that a slow reader of the log never blocks the event loop. Waiting lines are written before
    the context ends. With a model's name, each line has it.
    """
    lowest = logging.getLevelNamesMapping()[level.upper()]
    handler = _Handler(stream or sys.stdout)
    handler.setFormatter(LineFormatter(form, model))
    lines: queue.Queue[logging.LogRecord] = queue.Queue(_MOST_WAITING)
    listener = QueueListener(lines, handler)
    root = logging.getLogger()
    before = root.handlers[:]
    levels = {logger: logger.level for logger in (root, *map(logging.getLogger, _OURS))}
    root.handlers[:] = [_Queue(lines)]
    for logger in levels:
        logger.setLevel(max(lowest, logging.INFO) if logger is root else lowest)
    for name in ("uvicorn.error", "httpx", "httpcore", "botocore", "urllib3", "s3transfer", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(_no_broken_promise)
    listener.start()
    try:
        yield
    finally:
        root.handlers[:] = before
        for logger, old in levels.items():
            logger.setLevel(old)
        listener.stop()


def _no_broken_promise(record: logging.LogRecord) -> bool:
    """Drop uvicorn's complaint about a reply that was cut off; our own line gives the reason."""
    return "without completing response" not in record.getMessage()


def _text(value: object) -> str:
    text = f"{value:.1f}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class Refusals:
    """Requests refused before their bodies were read. There may be thousands: one line a second counts them."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, error: ServingError) -> None:
        """Count a refusal. error: its message is logged, so it must contain nothing of the client's."""
        self._counts[error.message] += 1
        if self._timer is None:
            self._log()

    def _log(self) -> None:
        self._timer = None
        if not self._counts:
            return
        for message, count in self._counts.items():
            _requests.warning("refused %d requests before reading their bodies: %s", count, message)
        self._counts.clear()
        self._timer = asyncio.get_running_loop().call_later(_REFUSALS_SECONDS, self._log)


def log_prompt(request_id: str, body: bytes) -> None:
    """Log a request's body without its links, which may be images. A body that is not JSON is not shown.

    It needs no more time and memory than parsing the body, because it stops at the first characters that are shown.
    """
    try:
        if len(body) > LONG_BYTES:
            check_body(body, 0)
        shown = json.dumps(without_links(msgspec.json.decode(body)), ensure_ascii=False)
    except (ValueError, RecursionError, msgspec.MsgspecError, ServingError):
        shown = f"[{len(body)} bytes that are no JSON, or hold too much of something]"
    _prompts.info("prompt", extra={"facts": {"request_id": request_id, "body": shown[:_SHOWN]}})


def log_answer(request_id: str, reply: Reply) -> None:
    """Log a reply's body; a stream's body is logged when it ends."""
    if reply.chunks is None:
        _log_answer(request_id, reply.body)
    else:
        reply.chunks = _recorded(request_id, reply.chunks)


async def _recorded(request_id: str, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    said = bytearray()
    try:
        async for chunk in chunks:
            said += chunk[: max(0, _SHOWN - len(said))]
            yield chunk
    finally:
        _log_answer(request_id, bytes(said))
        aclose = getattr(chunks, "aclose", None)
        if aclose is not None:
            await aclose()


def _log_answer(request_id: str, body: bytes) -> None:
    text = body[:_SHOWN].decode(errors="replace")
    _prompts.info("answer", extra={"facts": {"request_id": request_id, "body": text}})


def without_links(value: Any, window: int = WINDOW) -> Any:
    """Copy a JSON value with `[link]` for each link, up to the number of characters that are shown."""
    return _LinkRemover(window).copied(value)


class _LinkRemover:
    def __init__(self, window: int) -> None:
        self._left = _SHOWN
        self._window = window

    def copied(self, value: Any) -> Any:
        self._left -= 1
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, list):
            return [self.copied(item) for item in value if self._left > 0]
        if isinstance(value, dict):
            return {self._text(name[:_SHOWN]): self.copied(item) for name, item in value.items() if self._left > 0}
        return value

    def _text(self, text: str) -> str:
        pieces: list[str] = []
        position = 0
        while position < len(text) and self._left > 0:
            piece = text[position : position + self._window]
            link = LINK.search(piece)
            if link is None:
                # The beginning of a link may be cut off at the window's end.
                whole = piece if position + self._window >= len(text) else piece[:-_SCHEME]
                position += len(whole)
                self._add(pieces, whole)
            else:
                self._add(pieces, piece[: link.start()] + "[link]")
                position = self._end_of_link(text, position + link.start())
        return "".join(pieces)

    def _add(self, pieces: list[str], piece: str) -> None:
        pieces.append(piece[: self._left])
        self._left -= len(piece)

    def _end_of_link(self, text: str, start: int) -> int:
        for at in range(start, len(text), self._window):
            if (end := _LINK_END.search(text, at, at + self._window)) is not None:
                return end.start()
        return len(text)
