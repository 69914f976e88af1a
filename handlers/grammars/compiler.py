"""Compiles constraints to grammars, each distinct one once, in processes that can be ended."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict

import msgspec

from engine.config import Vocabulary
from handlers.errors import InvalidRequest, Overloaded, Unavailable
from handlers.grammars.messages import Job, Outcome
from handlers.request import Constraint
from processes.child import Child, Log

logger = logging.getLogger(__name__)
worker_log = logging.getLogger("processes.grammars")
"""Output of the processes."""

MOST_WORKERS = 2
MOST_WAITING = 256
"""Greatest number of distinct constraints that are being compiled or wait for it."""

MOST_KNOWN = 1024
MOST_KNOWN_BYTES = 32 << 20
"""Limits of the cache of outcomes, refusals included; the most recently used ones are kept."""

MOST_OUTCOME_BYTES = 64 << 20
"""Limit of a reply's size, far above that of any grammar, since the source of each is bounded."""

_TOO_SLOW = Outcome(reason="compiling it took longer than", last=True)
_DIED = Outcome(reason="it is too large or too deeply nested to compile", last=True)

START_SECONDS = 60.0
END_SECONDS = 5.0


class GrammarCompiler:
    """Compiles constraints; its processes start when they are first needed. Used on one event loop."""

    def __init__(self, vocabulary: Vocabulary, timeout: float) -> None:
        """timeout: seconds for compiling a constraint."""
        self._vocabulary = vocabulary
        self._timeout = timeout
        self._known: OrderedDict[Job, Outcome] = OrderedDict()
        self._known_bytes = 0
        self._running: dict[Job, asyncio.Task[Outcome]] = {}
        self._slots = asyncio.Semaphore(MOST_WORKERS)
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._ending: set[asyncio.Task[None]] = set()

    async def compile(self, constraint: Constraint) -> str:
        """Return the grammar for the engine.

        Raises:
            InvalidRequest: The constraint cannot be used; the message names the client's field and the reason.
            Overloaded: Too many constraints are waiting.
            Unavailable: No process can be started.
        """
        job = Job(constraint.kind, constraint.value, constraint.whitespace_pattern)
        outcome = self._known.get(job)
        if outcome is None:
            # Not cancelled with the client: another may be waiting for the same constraint.
            outcome = await asyncio.shield(self._task(job))
        else:
            self._known.move_to_end(job)
        if outcome.reason is not None:
            raise InvalidRequest(f"{constraint.param} cannot be used: {outcome.reason}", param=constraint.param)
        return outcome.grammar

    async def close(self) -> None:
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        workers = [*self._idle, *self._busy]
        self._idle.clear()
        await asyncio.gather(*(worker.end() for worker in workers), *self._ending)

    def _task(self, job: Job) -> asyncio.Task[Outcome]:
        task = self._running.get(job)
        if task is None:
            if len(self._running) >= MOST_WAITING:
                raise Overloaded("too many new grammars and schemas are being compiled; try again", retry_after=5)
            task = self._running[job] = asyncio.create_task(self._compile(job), name="compile-grammar")
            task.add_done_callback(lambda done: self._done(job, done))
        return task

    def _done(self, job: Job, task: asyncio.Task[Outcome]) -> None:
        del self._running[job]
        if not task.cancelled():
            task.exception()  # retrieved so that asyncio does not log it; the waiting requests get it

    async def _compile(self, job: Job) -> Outcome:
        async with self._slots:
            worker = self._free()
            used = worker.alive
            outcome = await self._ask(worker, job)
            if outcome is _DIED and used:  # an earlier constraint may be to blame
                outcome = await self._ask(Worker(), job)
        if outcome is not _TOO_SLOW:
            self._remember(job, outcome)
            return outcome
        # Not cached: the machine may only have been busy.
        return Outcome(reason=f"{outcome.reason} {self._timeout:g} s (option.guided_decoding_timeout): make it simpler")

    async def _ask(self, worker: Worker, job: Job) -> Outcome:
        self._busy.add(worker)
        try:
            await worker.start(self._vocabulary)
            async with asyncio.timeout(self._timeout):
                outcome = await worker.ask(job)
        except TimeoutError:
            outcome = _TOO_SLOW
        except (EOFError, OSError):
            outcome = _DIED
        except BaseException:
            self._end(worker)
            raise
        finally:
            self._busy.discard(worker)
        if outcome.last:
            self._end(worker)
        else:
            self._idle.append(worker)
        return outcome

    def _free(self) -> Worker:
        """Return an idle process that is alive, else a new one."""
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                return worker
            self._end(worker)
        return Worker()

    def _end(self, worker: Worker) -> None:
        task = asyncio.create_task(worker.end(), name="end-grammar-worker")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _remember(self, job: Job, outcome: Outcome) -> None:
        self._known[job] = outcome
        self._known_bytes += _size(job, outcome)
        while len(self._known) > MOST_KNOWN or self._known_bytes > MOST_KNOWN_BYTES:
            self._known_bytes -= _size(*self._known.popitem(last=False))


class Worker:
    """A process that compiles grammars. module: the module that it runs; tests replace it."""

    def __init__(self, module: str = "handlers.grammars.worker") -> None:
        self._module = module
        self._child: Child | None = None
        self._working = False

    @property
    def alive(self) -> bool:
        """Whether the process is running; only meaningful while it has no work."""
        return self._child is not None and not self._child.has_ended()

    async def start(self, vocabulary: Vocabulary) -> None:
        """Start the process, unless it is started already. Raises Unavailable."""
        if self._child is not None:
            return
        try:
            self._child = await Child.start(self._module, "plain", Log(worker_log, logging.WARNING, bounded=True))
            async with asyncio.timeout(START_SECONDS):
                self._child.send(msgspec.msgpack.encode(vocabulary))
                await self._child.receive()
        except (EOFError, OSError) as error:  # TimeoutError among them
            logger.exception("the process that compiles grammars could not be started")
            raise Unavailable("constraints cannot be compiled now; try again", retry_after=5) from error

    async def ask(self, job: Job) -> Outcome:
        """Compile a constraint. Raises EOFError or OSError if the process ends."""
        assert self._child is not None
        self._working = True
        try:
            self._child.send(msgspec.msgpack.encode(job))
            reply = await self._child.receive(MOST_OUTCOME_BYTES)
        except (EOFError, OSError):
            self._working = False
            raise
        self._working = False
        return msgspec.msgpack.decode(reply, type=Outcome)

    async def end(self) -> None:
        """End the process: it ends when its connection closes, and is killed if it is working or does not end."""
        if self._child is None:
            return
        if self._working:
            self._child.kill()
        await self._child.stop(END_SECONDS)


def _size(job: Job, outcome: Outcome) -> int:
    return len(job.value or "") + len(outcome.grammar) + 200
