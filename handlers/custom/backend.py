"""The processes of the user's handler: who gets a call, and what happens when one of them dies."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import deque
from pathlib import Path

from pydantic import SecretStr

from handlers.backends.adapters import AdapterStore
from handlers.backends.base import BackendStats, Capabilities, Health
from handlers.custom.find import OwnFormatters, OwnHandler, refuse_unusable
from handlers.custom.messages import Start
from handlers.custom.process import HandlerCall, HandlerProcess
from handlers.errors import CustomCodeError, ServingError, Unavailable
from processes.restarts import Restarts
from properties.configuration import Configuration
from properties.field import Level

logger = logging.getLogger(__name__)


class CustomBackend:
    """See `handlers.backends.base.Lifecycle`. What requests ask of it is `call`: it has no prompts and no tokens."""

    adapters: AdapterStore | None = None

    def __init__(self, start: Start, processes: int, retry_threshold: int) -> None:
        """retry_threshold: deaths of a process, with no answer between them, that a restart answers."""
        self._start = start
        self._processes = [HandlerProcess(start, self._serve_waiting) for _ in range(processes)]
        self._tries = [Restarts(retry_threshold) for _ in range(processes)]
        self._waiting: deque[tuple[asyncio.Future[HandlerCall], dict[str, str], bytes]] = deque()
        self._keepers: list[asyncio.Task[None]] = []
        self._restarts = 0
        self._lost = 0

    @classmethod
    def from_configuration(
        cls, configuration: Configuration, model_path: Path, own: OwnHandler
    ) -> CustomBackend:
        """model_path: of the model's files, which may lie elsewhere than the handler. Raises InvalidConfiguration."""
        refuse_unusable(own)
        settings = configuration.settings
        directory = str(own.directory.resolve())
        properties = _properties(configuration) | {
            "model_dir": directory,
            "model_id": str(model_path.resolve()),
        }
        if isinstance(own, OwnFormatters):
            # The engine would be of no use without them: they are started again for ever.
            return cls(Start(directory, own.file, None, properties), 1, sys.maxsize)
        start = Start(directory, own.file, settings.handler, properties)
        return cls(start, settings.max_workers or 1, settings.retry_threshold)

    async def load(self) -> None:
        try:
            await asyncio.gather(*(process.start() for process in self._processes))
        except BaseException:
            await self.close()
            raise
        self._keepers = [asyncio.create_task(self._keep(number)) for number in range(len(self._processes))]
        logger.info("%s runs in %d processes", self._start.file, len(self._processes))

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(max_model_len=0, images=False)

    async def call(self, properties: dict[str, str], body: bytes) -> HandlerCall:
        """Begin a call as soon as a process is free for it, in the order of asking.

        Raises Unavailable. Cancelled, it leaves nothing behind.
        """
        if self._lost == len(self._processes):
            raise Unavailable("the model's own handler failed too often")
        future: asyncio.Future[HandlerCall] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, properties, body))
        self._serve_waiting()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().abandon(0.0)
            raise

    def health(self) -> Health:
        ready = sum(not process.died.is_set() for process in self._processes)
        if ready:
            return Health(True, "ready")
        if self._lost == len(self._processes):
            return Health(False, "the model's own handler failed too often", lost=True)
        tries = next((tries for tries in self._tries if tries.short is not None), self._tries[0])
        return Health(False, tries.reason("the model's own handler"))

    def stats(self) -> BackendStats:
        return BackendStats(
            running=sum(process.load for process in self._processes),
            waiting=len(self._waiting),
            engine_restarts=self._restarts,
            replicas=len(self._processes),
            replicas_ready=sum(not process.died.is_set() for process in self._processes),
        )

    async def close(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        self._fail_waiting(Unavailable("the server is stopping; send the request again", retry_after=5))
        await asyncio.gather(*(process.stop() for process in self._processes), return_exceptions=True)

    def _serve_waiting(self) -> None:
        while self._waiting:
            future, properties, body = self._waiting[0]
            free = [process for process in self._processes if process.free]
            if future.done():
                self._waiting.popleft()
                continue
            if not free:
                return
            self._waiting.popleft()
            try:
                future.set_result(min(free, key=lambda process: process.load).call(properties, body))
            except ServingError as error:
                future.set_exception(error)

    def _fail_waiting(self, error: ServingError) -> None:
        while self._waiting:
            future = self._waiting.popleft()[0]
            if not future.done():
                future.set_exception(error)

    async def _keep(self, number: int) -> None:
        """Replace a process that dies, until it has died too often without an answer."""
        while True:
            process, tries = self._processes[number], self._tries[number]
            await process.died.wait()
            await process.stop()
            tries.died(served=process.answered)
            while not tries.exhausted:
                await asyncio.sleep(tries.pause)
                self._restarts += 1
                logger.warning("process %d of the model's own handler ended; it is restarted", number)
                fresh = HandlerProcess(self._start, self._serve_waiting)
                try:
                    await fresh.start()
                except (CustomCodeError, OSError) as error:
                    logger.error("%s", error)
                    tries.failed(error)
                else:
                    tries.succeeded()
                    self._processes[number] = fresh
                    self._serve_waiting()
                    break
            else:
                break
        self._lost += 1
        logger.error("process %d of the model's own handler failed too often", number)
        if self._lost == len(self._processes):
            self._fail_waiting(Unavailable("the model's own handler failed too often"))


def _properties(configuration: Configuration) -> dict[str, str]:
    """What the first call is told: every option that was given, as it was written, but no secret."""
    told = {
        name: source.raw or ""
        for name, source in configuration.sources.items()
        if source.level < Level.RECOMMENDED
        and not isinstance(getattr(configuration.settings, name), SecretStr)
    }
    return told | {name: str(item.value) for name, item in configuration.extra.items()}
