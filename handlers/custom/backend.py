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
from handlers.errors import ServingError, Unavailable
from processes.supervisor import Supervisor, why_down
from properties.configuration import Configuration
from properties.field import Level

logger = logging.getLogger(__name__)


class CustomBackend:
    """See `handlers.backends.base.Lifecycle`. What it is asked by requests is `call`: it has no prompts, no tokens."""

    adapters: AdapterStore | None = None

    def __init__(self, start: Start, processes: int, retry_threshold: int) -> None:
        """retry_threshold: deaths of a process, with no answer between them, that a restart answers."""
        self._start = start
        self._supervisors = [
            Supervisor(
                f"process {number} of the model's own handler",
                lambda: HandlerProcess.start(start, self._serve_waiting),
                retry_threshold=retry_threshold,
                changed=self._changed,
            )
            for number in range(processes)
        ]
        self._waiting: deque[tuple[asyncio.Future[HandlerCall], dict[str, str], bytes]] = deque()

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
        start = Start(directory, own.file, own.function, properties, own.standard)
        return cls(start, settings.max_workers or 1, settings.retry_threshold)

    async def load(self) -> None:
        starts = [asyncio.ensure_future(supervisor.start()) for supervisor in self._supervisors]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:  # the first failure ends the others
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self.close()
            raise
        logger.info("%s runs in %d processes", self._start.file, len(self._supervisors))

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(max_model_len=0, images=False)

    async def call(self, properties: dict[str, str], body: bytes) -> HandlerCall:
        """Begin a call as soon as a process is free for it, in the order of asking.

        Raises Unavailable. Cancelled, it leaves nothing behind.
        """
        if self._given_up:
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
        if self._alive:
            return Health(True, "ready")
        return Health(False, why_down(self._supervisors, "the model's own handler"), lost=self._given_up)

    def stats(self) -> BackendStats:
        alive = self._alive
        return BackendStats(
            running=sum(process.load for process in alive),
            waiting=len(self._waiting),
            engine_restarts=sum(supervisor.restarts for supervisor in self._supervisors),
            replicas=len(self._supervisors),
            replicas_ready=len(alive),
        )

    async def close(self) -> None:
        self._fail_waiting(Unavailable("the server is stopping; send the request again", retry_after=5))
        await asyncio.gather(*(supervisor.close() for supervisor in self._supervisors))

    @property
    def _alive(self) -> list[HandlerProcess]:
        processes = [supervisor.current for supervisor in self._supervisors]
        return [process for process in processes if process is not None and not process.died.is_set()]

    @property
    def _given_up(self) -> bool:
        return all(supervisor.given_up for supervisor in self._supervisors)

    def _changed(self) -> None:
        self._serve_waiting()
        if self._given_up:
            self._fail_waiting(Unavailable("the model's own handler failed too often"))

    def _serve_waiting(self) -> None:
        while self._waiting:
            future, properties, body = self._waiting[0]
            free = [process for process in self._alive if process.free]
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


def _properties(configuration: Configuration) -> dict[str, str]:
    """What the first call is told: every option that was given, as it was written, but no secret."""
    told = {
        name: source.raw or ""
        for name, source in configuration.sources.items()
        if source.level < Level.RECOMMENDED
        and not isinstance(getattr(configuration.settings, name), SecretStr)
    }
    return told | {name: str(item.value) for name, item in configuration.extra.items()}
