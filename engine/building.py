"""Grammars are compiled beside the steps: in a thread, while the requests that run go on."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.guidance import GrammarError, Guidance, Guide
from engine.messages import Add

logger = logging.getLogger(__name__)

STACK_BYTES = 64 << 20
"""For grammars nested so deeply that they just compiled on the usual stack of the process that checked them."""


@dataclass(slots=True)
class Built:
    """A request whose grammar is compiled, or cannot be: `reason` says why. Its aborted answers are listed."""

    add: Add
    guides: list[Guide]
    reason: str | None
    aborted: set[int]


class GuideBuilder:
    """Requests in, `Built` ones out, in the same order. All methods belong to the engine's own thread."""

    def __init__(self, guidance: Guidance | None, done: Callable[[Built], None]) -> None:
        """done: called in the building thread; what it is given is then to be `take`n."""
        self._guidance = guidance
        self._done = done
        self._inbox: queue.SimpleQueue[Built] = queue.SimpleQueue()
        self._waiting: dict[int, Built] = {}
        self._thread: threading.Thread | None = None

    def start(self, add: Add) -> None:
        built = Built(add, [], None, set())
        self._waiting[add.request_id] = built
        if self._thread is None:
            before = threading.stack_size(STACK_BYTES)
            self._thread = threading.Thread(target=self._run, daemon=True, name="grammars")
            self._thread.start()
            threading.stack_size(before)
        self._inbox.put(built)

    def abort(self, request_ids: Iterable[int]) -> None:
        """Remember that these answers, where they belong to a request that waits here, are not wanted."""
        for request_id in request_ids:
            for built in self._waiting.values():
                if request_id in built.add.answer_ids:
                    built.aborted.add(request_id)

    def take(self, built: Built) -> None:
        """The request waits no more."""
        del self._waiting[built.add.request_id]

    def _run(self) -> None:
        while True:
            built = self._inbox.get()
            try:
                if self._guidance is None:
                    raise GrammarError("this model's answers cannot be constrained")
                if len(built.aborted) < len(built.add.seeds):
                    built.guides = self._guidance.build(built.add.grammar or "", len(built.add.seeds))
            except GrammarError as error:
                built.reason = str(error)
            except BaseException:  # a panic in Rust is no Exception, and this thread must go on
                logger.exception("a grammar could not be compiled")
                built.reason = "the grammar cannot be compiled"
            self._done(built)
