"""Log lines on standard output, as text or JSON: one event a line, whatever a client wrote into it."""

from __future__ import annotations

import json
import logging
import queue
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler, QueueListener
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

_OURS = ("container", "handlers", "engine", "processes", "properties")
"""The loggers that may say more than `info`; libraries never do."""

_MOST_WAITING = 20_000
"""Lines that may wait for a slow reader of the output; more are dropped rather than stop the server."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN = re.compile(r"[\w.:/@+-]+", re.ASCII)


def one_line(text: str) -> str:
    """The text with control characters and line breaks written as escapes."""
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), text)


class _Formatter(logging.Formatter):
    """Common to both forms: facts travel in a record's `facts`, an exception in its `exc_info`."""

    @staticmethod
    def stamp(record: logging.LogRecord) -> str:
        whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return f"{whole}.{int(record.msecs):03d}Z"

    @staticmethod
    def trace(record: logging.LogRecord) -> list[str]:
        if not record.exc_info or record.exc_info[0] is None:
            return []
        lines = traceback.format_exception(*record.exc_info)
        return [line for block in lines for line in block.rstrip("\n").split("\n")]


class TextFormatter(_Formatter):
    """`TIME LEVEL logger: message key=value ...`; a traceback's lines follow, each marked with `  | `."""

    def format(self, record: logging.LogRecord) -> str:
        words = [f"{self.stamp(record)} {record.levelname} {record.name}: {one_line(record.getMessage())}"]
        facts: dict[str, Any] = getattr(record, "facts", {})
        words += [f"{name}={_text(value)}" for name, value in facts.items() if value is not None]
        return "\n".join([" ".join(words), *(f"  | {one_line(line)}" for line in self.trace(record))])


class JsonFormatter(_Formatter):
    """One JSON object a line, a traceback in its field `traceback`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.stamp(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        facts: dict[str, Any] = getattr(record, "facts", {})
        line.update((name, value) for name, value in facts.items() if value is not None)
        trace = self.trace(record)
        if trace:
            line["traceback"] = "\n".join(trace)
        return json.dumps(line, default=str)


class _Queue(QueueHandler):
    """Hands records over as they are: the other end is a thread of this process."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            return


@contextmanager
def logging_to(
    stream: TextIO | None = None, form: LogFormat = "text", level: LogLevel = "info"
) -> Iterator[None]:
    """Send the whole program's log to a stream (standard output) from a thread of its own, so that a slow
    reader of the log never holds up the event loop. What waits is written before the context is left."""
    lowest = logging.getLevelNamesMapping()[level.upper()]
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
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
    """Not uvicorn's complaint about a reply that we cut off; our own line says why."""
    return "without completing response" not in record.getMessage()


def _text(value: object) -> str:
    text = f"{value:.1f}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
