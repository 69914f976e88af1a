"""The server process from start to stop: configure, bind, fetch, load, serve, drain, exit."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import uvicorn

from container import page
from container.app import App
from container.build import Served, build_backend, build_formatters
from container.config import configured, unreadable
from container.logs import logging_to, on_terminal
from container.metrics import Metrics
from container.models.models import Models
from container.protocol import HEAD_SECONDS, Connections, Protocol, raise_descriptor_limit
from container.requirements import install, requirements_to_install
from container.state import ServerState
from handlers.artefacts import ArtefactError
from handlers.artefacts.fetch import fetch
from handlers.backends.base import Lifecycle
from handlers.build import build_images, with_model_directory
from handlers.custom.formatters import Formatters
from handlers.errors import ServingError
from handlers.images.loader import ImageLoader
from handlers.progress import LOG_SECONDS, TERMINAL_SECONDS, Progress, current, shown
from handlers.protocols.errors import own_words
from processes.environment import forget_keys
from properties.configuration import Configuration
from properties.problem import ConfigurationError

logger = logging.getLogger(__name__)

BackendBuilder = Callable[[Configuration, Path], Served]
T = TypeVar("T")

_LAST_SECONDS = 4.0
"""The end of drain_timeout that is reserved for closing, because the platform kills the process after it."""

_CLOSE_SECONDS = 3.0
"""The part of `_LAST_SECONDS` in which the backend must close."""

_TELL_SECONDS = 0.2

_LOOK_SECONDS = 0.5
"""The pause between two checks whether the backend is lost."""

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 620
"""Longer than load balancers keep an idle connection (AWS 60 s, Google 600 s), because they must close it first."""

_UNACKNOWLEDGED_SECONDS = 120

_ACCEPTS = 32
"""Connections accepted in one turn of the event loop. libuv accepts one for each listening descriptor, so with a single
descriptor a probe behind many new connections would wait for as many turns."""


class LoadFailed(Exception):
    """The model cannot be served; the message contains the reason and the remedy."""


class EngineLost(Exception):
    """The engine failed too often to be restarted; the process ends, so that the platform replaces it."""


class Server:
    """Serves one model or several on one port, from start to end.

    Attributes:
        failure: Why the server cannot go on, once that is known.
    """

    def __init__(
        self,
        configuration: Configuration,
        build: BackendBuilder = build_backend,
        listener: socket.socket | None = None,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Listen on the configured port; `run` serves.

        Args:
            configuration: The options.
            build: Called in a thread once the model's files are on this machine.
            listener: A listening socket; None for the configured port.
            ready: Called when the model can answer.

        Raises:
            OSError: The port is taken.
        """
        self.failure: BaseException | None = None
        self.configuration = configuration
        self.state = ServerState()
        self.metrics = Metrics(self.state.stats)
        self.listener = listener or bind(configuration.settings.host, configuration.settings.port)
        self._build = build
        self._ready = ready
        self._images: ImageLoader | None = None
        self._backend: Lifecycle | None = None
        self._formatters: Formatters | None = None
        self._installed: TemporaryDirectory[str] | None = None
        self._fetch_cancelled = threading.Event()
        self._stop = asyncio.Event()
        self._several = configuration.settings.multi_model
        self._app = App(configuration, self.state, self.metrics)

    async def run(self) -> int:
        """Serve until a signal or a failure, and return the process's exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        http = HttpServer(self._app)
        self.metrics.connections = http.connections
        serving = loop.create_task(http.listen(self.listener))
        loading = loop.create_task(self._load())
        stopping = loop.create_task(self._stop.wait())
        losing = loop.create_task(self._until_lost())
        logger.info("listening on %s", address_of(self.listener))
        await asyncio.wait({loading, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        failure = loading.exception() if loading.done() else None
        if loading.done() and failure is None:
            await asyncio.wait({stopping, serving, losing}, return_when=asyncio.FIRST_COMPLETED)
        if failure is None and serving.done():
            failure = serving.exception() or RuntimeError("the HTTP server ended by itself")
        if failure is None and losing.done():
            failure = EngineLost(self.state.health().reason)
        losing.cancel()
        if failure is not None:
            self.failure = failure
            self._report(failure)
        await self._shut_down(http, serving, loading)
        return 0 if failure is None else 1

    def request_stop(self) -> None:
        self._stop.set()

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._stop.is_set():
            logger.warning("%s again: exiting at once", name)
            threading.Timer(0.2, os._exit, (128 + number,)).start()
            return
        logger.info("%s: stopping; running requests may finish", name)
        self.request_stop()

    async def _until_lost(self) -> None:
        """Return when the backend will never be able to generate again."""
        while not self.state.health().lost:  # noqa: ASYNC110 - health has no event to wait for
            await asyncio.sleep(_LOOK_SECONDS)

    async def _load(self) -> None:
        """Fetch the model, load it, and begin to serve. Raises LoadFailed, ConfigurationError, ServingError."""
        seconds = self.configuration.settings.model_loading_timeout
        began = time.monotonic()
        try:
            every = LOG_SECONDS if not on_terminal() else TERMINAL_SECONDS
            with shown(self._tell, every) as self.state.progress:
                async with asyncio.timeout(seconds):
                    await (self._load_several() if self._several else self._fetch_and_load())
        except TimeoutError as error:
            raise LoadFailed(
                f"the model was not ready within {seconds:.0f} s ({self.state.reason}); raise "
                "option.model_loading_timeout"
            ) from error
        logger.info("ready after %.1f s", time.monotonic() - began)
        self._ready()

    async def _load_several(self) -> None:
        """Begin to serve models that are loaded later, and those of the configured directory. Raises LoadFailed."""
        self.state.reason = "the models are loading"
        words = _words()
        self._backend = models = Models(self.configuration)
        try:
            await models.load()
        except (ServingError, ArtefactError) as error:
            raise LoadFailed(str(error)) from error
        await words
        self.state.several = models
        self.state.serve(models, models)

    def _tell(self, progress: Progress) -> None:
        if on_terminal():
            logger.info("%s%s", progress.bar, progress, extra={"passing": True})
        else:
            logger.info("%s: %s", self.state.reason, progress)

    async def _fetch_and_load(self) -> None:
        words = _words()
        location = self.configuration.model_location
        if location.kind != "directory":
            self.state.reason = "the model is being downloaded"
            logger.info("fetching %s", location.value)
        try:
            directory = await in_daemon_thread(
                lambda: fetch(location, self.configuration.settings, self._fetch_cancelled)
            )
        except ArtefactError as error:
            raise LoadFailed(str(error)) from error
        current().begin("")
        self.configuration = configuration = with_model_directory(self.configuration, directory)
        self._app.configure(configuration)
        if (file := requirements_to_install(configuration, directory)) is not None:
            self.state.reason = "requirements.txt is being installed"
            self._installed = await install(file, configuration.settings.offline)
        self.state.reason = "the model is loading"
        served = await in_daemon_thread(lambda: self._build(configuration, directory))
        self._formatters = formatters = await in_daemon_thread(lambda: build_formatters(configuration, directory))
        if formatters is not None:
            await formatters.load()
        self._backend = backend = await served.start()
        self._images = self.metrics.images = build_images(configuration.settings)
        service = (
            None
            if served.service is None
            else served.service(backend, configuration, self._images, self.metrics, formatters)
        )
        await words
        gc.collect()
        gc.freeze()  # What is loaded stays; collecting it again would stop all threads for 0.2 s each time.
        if page.is_on(configuration) and served.choice is not None:
            self._app.light.model_page = page.ModelPage(configuration, directory, served.choice)
        self.state.serve(backend, service)
        if backend.capabilities.images:
            self._images.decoders.warm_up()

    def _report(self, failure: BaseException) -> None:
        if isinstance(failure, ConfigurationError):
            for problem in failure.problems:
                logger.error("the model cannot be served: %s", problem)
        elif isinstance(failure, OSError) and failure.filename is not None:
            logger.error("the model cannot be served: %s", unreadable(failure))
        elif isinstance(failure, LoadFailed | EngineLost | ServingError):
            logger.error("the server cannot go on: %s", failure)
        else:
            logger.error("the server cannot go on: %s", failure, exc_info=failure)
        if failure.__cause__ is not None:
            logger.debug("it was caused by", exc_info=failure.__cause__)
        reason = str(failure) if isinstance(failure, EngineLost) else "the model could not be loaded"
        self.state.fail(f"{reason}; the log says why")

    async def _shut_down(self, http: HttpServer, serving: asyncio.Task[None], loading: asyncio.Task[None]) -> None:
        """Refuse new requests, finish running ones, and abort the rest, all within drain_timeout."""
        if self.state.phase != "failed":
            self.state.drain()
        self._fetch_cancelled.set()
        loading.cancel()
        await asyncio.wait({loading}, timeout=_CLOSE_SECONDS)
        seconds = self.configuration.settings.drain_timeout
        try:
            async with asyncio.timeout(max(seconds - _LAST_SECONDS, seconds / 2)):
                await self._app.idle.wait()
        except TimeoutError:
            logger.warning("aborting %d requests that did not finish in time", len(self._app.calls))
        await self._close_backend()
        for call in list(self._app.calls):
            call.exchange.stop("shutdown")
        http.should_exit = True
        await asyncio.wait({serving})
        if self._installed is not None:
            self._installed.cleanup()
        logger.info("stopped")

    async def _close_backend(self) -> None:
        """Close the backend, which fails the requests still running; they get a moment to reply to their clients."""
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                if (closing := self.state.service or self._backend) is not None:
                    await closing.close()
                if self._formatters is not None:
                    await self._formatters.close()
                if self._images is not None:
                    await self._images.aclose()
            async with asyncio.timeout(_TELL_SECONDS):
                await self._app.idle.wait()
        except TimeoutError:
            return


def start(
    model: str | None,
    options: Sequence[str],
    environ: Mapping[str, str],
    defaults: Mapping[str, str],
    warnings: Sequence[str] = (),
    build: BackendBuilder | None = None,
) -> int:
    """Read the configuration, set up logging, serve to the end, and return the process's exit status.

    Args:
        model: The model's location from the command line; None if the options name it.
        options: Options from the command line, each as KEY=VALUE.
        environ: The environment variables.
        defaults: The values of options that no source of the configuration sets.
        warnings: Logged at the start; they are about the command line.
        build: Makes the backend; None for the one that the options select.
    """
    try:
        configuration = configured(model, options, environ, defaults)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 1
    forget_keys()
    settings = configuration.settings
    with logging_to(form=settings.log_format, level=settings.log_level):
        _announce(configuration)
        for warning in warnings:
            logger.warning("%s", warning)
        return serve(configuration, build or build_backend)


def _announce(configuration: Configuration) -> None:
    location, several = configuration.model_location, configuration.settings.multi_model
    logger.info("%s %s (%s)", "models in" if several else "model", location.value, location.kind)
    for problem in configuration.warnings:
        logger.warning("%s", problem)


def serve(configuration: Configuration, build: BackendBuilder = build_backend) -> int:
    """Run a server to its end and return the process's exit status."""
    import uvloop

    async def run() -> int:
        try:
            server = Server(configuration, build)
        except OSError as error:
            settings = configuration.settings
            logger.error(
                "cannot listen on %s:%d: %s; set host and port to an address of this machine that is free",
                settings.host, settings.port, error.strerror,
            )  # fmt: skip
            return 1
        return await server.run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def _words() -> asyncio.Task[frozenset[str]]:
    """Prepare what the log of a refused request needs: the first one would hold up all others for it."""
    return asyncio.create_task(in_daemon_thread(own_words))


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """Run blocking work in a thread that does not keep the process from exiting."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        outcome: tuple[Any, BaseException | None]
        try:
            outcome = work(), None
        except BaseException as error:
            outcome = None, error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    context = copy_context()  # which says where progress is reported
    threading.Thread(target=context.run, args=(run,), daemon=True, name="load").start()
    return await done


class HttpServer(uvicorn.Server):
    """Uvicorn with our protocol. It serves until `should_exit`; its owner handles signals."""

    def __init__(self, app: App, head_seconds: float = HEAD_SECONDS) -> None:
        self.connections = Connections(raise_descriptor_limit())
        protocol = partial(
            Protocol, connections=self.connections, on_malformed=app.on_malformed, head_seconds=head_seconds
        )
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=2,
            )
        )

    def listen(self, listener: socket.socket) -> Coroutine[Any, Any, None]:
        """Return what serves until `should_exit`."""
        # Each accept needs a descriptor of its own.
        accepts = min(_ACCEPTS, max(1, self.connections.limit // 8))
        return self.serve([listener, *(listener.dup() for _ in range(accepts - 1))])

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """Return a listening TCP socket; port 0 takes any free one. Raises OSError."""
    infos = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = infos[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = _UNACKNOWLEDGED_SECONDS * 1000
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the listener's address as `host:port`, or that of a Unix socket, for the log."""
    name: tuple[Any, ...] | str = listener.getsockname()
    if isinstance(name, str):
        return name
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
