"""One model: its process, which is started, watched and stopped, and the requests that it answers."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec

from container.logs import WRITTEN
from container.models.forward import ModelClient
from container.models.messages import Answer, Failure, Prepare, Prepared, Start
from handlers.errors import InsufficientStorage, InvalidRequest, NotFound, ServingError, Unavailable
from handlers.request import Incoming, Reply
from processes.child import Child, Log
from properties.settings import Settings

logger = logging.getLogger(__name__)

_STOP_SECONDS = 5.0
"""How long a model's server may take to end before it is killed."""

_OUTPUT = Log(logging.getLogger(WRITTEN), logging.CRITICAL, levels=False)
_KILLED = -9


class Model:
    """A model that is loaded, or being loaded.

    Its process is started by `load`. After it has ended by itself, or was stopped because it had no requests, the next
    request starts it again.

    Attributes:
        taken: The memory that it takes; None while no process of it runs.
    """

    def __init__(
        self,
        name: str,
        url: str,
        place: Path,
        socket: str,
        options: list[str],
        settings: Settings,
        admit: Callable[[Model, Prepared], None],
    ) -> None:
        """Prepare to load it.

        Args:
            name: The model's name in requests.
            url: As the client gave it.
            place: An empty directory, which `close` removes.
            socket: The path of the socket on which its server will listen.
            options: As on a command line, each NAME=VALUE.
            settings: The container's options.
            admit: Raises ServingError if the memory that the model needs is not free.
        """
        self.name = name
        self.url = url
        self.taken: Prepared | None = None
        self._place = place
        self._socket = socket
        self._options = options
        self._settings = settings
        self._admit = admit
        self._prepared: Prepared | None = None
        self._measured = asyncio.Event()
        self._child: Child | None = None
        self._client: ModelClient | None = None
        self._watching: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[ModelClient] | None = None
        self._changing = asyncio.Lock()
        self._calls = 0
        self._unasked = asyncio.Event()
        self._unasked.set()
        self._timer: asyncio.TimerHandle | None = None
        self._idling: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def status(self) -> Literal["PENDING", "READY", "IDLE"]:
        if self._client is not None:
            return "READY"
        return "PENDING" if self._prepared is None or self._starting is not None else "IDLE"

    async def load(self, source: Path, one_at_a_time: asyncio.Lock) -> None:
        """Unpack and measure it, and start its server. Raises ServingError."""
        files = self._place / "files"
        files.mkdir()
        try:
            async with one_at_a_time:  # The estimate takes memory itself, which no estimate counts.
                answer, child = await self._ask(
                    "container.models.prepare", Prepare(str(source), str(files), self._options), Log(logger)
                )
                await child.stop(_STOP_SECONDS)
            if isinstance(answer, Failure):
                raise self._error(answer, source, files)
            assert isinstance(answer, Prepared)
            self._prepared = answer
        finally:
            self._measured.set()
        await self._running()

    async def answer(self, incoming: Incoming) -> Reply:
        """Have its server answer a request. Raises ServingError."""
        self._calls += 1
        self._unasked.clear()
        if self._timer is not None:
            self._timer.cancel()
        try:
            return await (await self._running()).ask(incoming, self._answered)
        except BaseException:
            self._answered()
            raise

    async def metrics(self) -> str:
        """Return what its server exports for Prometheus. Raises Unavailable."""
        if self._client is None:
            raise Unavailable("no process of the model runs")
        return await self._client.read("/metrics")

    async def close(self, seconds: float = 0.0) -> None:
        """Answer no more requests, give those that are being answered time to end, and free everything."""
        self._closed = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._unasked.wait()
        if self._timer is not None:
            self._timer.cancel()
        if self._starting is not None:
            self._starting.cancel()
        async with self._changing:
            await self._stop()
        await asyncio.to_thread(shutil.rmtree, self._place, ignore_errors=True)

    async def _running(self) -> ModelClient:
        if self._client is not None:
            return self._client
        await self._measured.wait()
        if self._closed or self._prepared is None:
            raise no_such_model(self.name)
        if self._starting is None:
            self._starting = asyncio.create_task(self._start(self._prepared), name=f"start {self.name}")
            self._starting.add_done_callback(retrieve_failure)  # The request that waits for it may leave.
        starting = self._starting
        await asyncio.wait({starting})
        if starting.cancelled():
            raise no_such_model(self.name)
        return starting.result()

    async def _start(self, needs: Prepared) -> ModelClient:
        try:
            async with self._changing:
                self._admit(self, needs)
                self.taken = needs
                try:
                    self._child = await self._served(needs)
                except BaseException:
                    self.taken = None
                    raise
                self._client = client = ModelClient(
                    self._socket, self._settings.request_id_header_key or "x-request-id"
                )
                self._watching = asyncio.create_task(self._watch(self._child), name=f"watch {self.name}")
                self._rest()
                return client
        finally:
            self._starting = None

    async def _served(self, needs: Prepared) -> Child:
        """Start its server and return it once the model can answer. Raises ServingError."""
        settings = self._settings
        order = Start(self.name, needs.directory, self._socket, self._options, settings.log_format, settings.log_level)
        answer, child = await self._ask("container.models.serve", order, _OUTPUT)
        if isinstance(answer, Failure):
            await child.stop(_STOP_SECONDS)
            raise self._error(answer, Path(needs.directory))
        return child

    async def _ask(self, module: str, question: Prepare | Start, log: Log) -> tuple[Answer, Child]:
        """Start one of our modules and ask it. Raises ServingError if it ends without an answer, or takes too long."""
        seconds = self._settings.model_loading_timeout
        try:
            async with asyncio.timeout(seconds):
                return await _ask_process(module, question, log)
        except TimeoutError:
            raise ServingError(
                f"the model was not ready within {seconds:.0f} s (option.model_loading_timeout)"
            ) from None

    async def _watch(self, child: Child) -> None:
        """Clean up when its server has ended by itself."""
        with suppress(EOFError):
            await child.receive()  # It sends nothing more; this raises when it ends.
        code = await child.wait()
        logger.error("the server of model %s ended with code %d; its next request starts it again", self.name, code)
        self._watching = None
        await self._stop()

    async def _stop(self) -> None:
        """End its server, if one runs. Requests that it still answers are not notified."""
        child, client, watching = self._child, self._client, self._watching
        self._child = self._client = self._watching = None
        if watching is not None:
            watching.cancel()
            await asyncio.wait({watching})
        if child is not None and child.returncode is None:
            await child.stop(_STOP_SECONDS)
        self.taken = None
        if client is not None:
            await client.close()

    def _answered(self) -> None:
        self._calls -= 1
        if self._calls == 0:
            self._unasked.set()
            self._rest()

    def _rest(self) -> None:
        """Begin to count the time without requests."""
        seconds = self._settings.model_idle_timeout
        if seconds is not None and self._calls == 0 and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._stop_idle)

    def _stop_idle(self) -> None:
        async def stop() -> None:
            async with self._changing:
                if self._calls == 0 and self._client is not None:
                    await self._stop()
                    logger.info("model %s had no requests; its processes were ended until the next one", self.name)

        self._idling = asyncio.create_task(stop(), name=f"stop idle {self.name}")

    def _error(self, failure: Failure, *paths: Path) -> ServingError:
        """Return the error for the client, with the url that it gave in place of paths of this machine."""
        message = failure.message
        for path in paths:
            message = message.replace(str(path), self.url)
        kind = {400: InvalidRequest, 404: NotFound, 507: InsufficientStorage}.get(failure.status, ServingError)
        return kind(message)


def no_such_model(name: str) -> NotFound:
    """Return the error for a request that names a model which is not loaded, in LMI's words."""
    return NotFound(f"Model or workflow not found: {name[:200]}")


def retrieve_failure(task: asyncio.Task[Any]) -> None:
    """Keep asyncio from logging a failure that no request waits for any more."""
    if not task.cancelled():
        task.exception()


async def _ask_process(module: str, question: Prepare | Start, log: Log) -> tuple[Answer, Child]:
    child = await Child.start(module, "server", log)
    try:
        child.send(msgspec.json.encode(question))
        return msgspec.json.decode(await child.receive(), type=Answer), child
    except EOFError as error:
        code = await child.wait()
        if code == _KILLED:
            raise InsufficientStorage("there was not enough memory: the system killed the model's process") from error
        raise ServingError(f"the model's process ended with code {code}; the log says why") from error
    except BaseException:
        child.kill()
        await child.wait()
        raise
