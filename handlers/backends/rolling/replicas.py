"""The replicas of one model, each an engine process: how one is started and watched, and which gets a request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from engine.config import EngineConfig
from engine.errors import EngineDead, EngineStopped, ModelLoadError, RequestRejected
from engine.messages import (
    Abort,
    Add,
    Answer,
    Ask,
    Cores,
    FromEngine,
    Loaded,
    LoadFailed,
    Output,
    Ping,
    Pong,
    Ready,
    Stats,
    StepDone,
    ToEngine,
)
from handlers import progress
from handlers.backends.weights_read import WARM_UP, weights_told
from processes.child import Child, Connection, Log
from processes.inside import MAX_FRAME_BYTES
from processes.supervisor import Supervisor, why_down

logger = logging.getLogger(__name__)
engine_log = logging.getLogger("engine.process")
"""The log of what the engine processes print."""

SHUTDOWN_SECONDS = 3.0
"""How long an engine that was asked to stop may take before it is killed."""

PING_SECONDS = 2.0
"""The pause between two checks whether an engine's loop is still running."""

STUCK_SECONDS = 120.0
"""An engine whose loop has not turned for this long is killed and restarted. A step is one turn, so this must be
longer than the longest step."""


class OutputStream:
    """The outputs of one request, in order. One task reads it; the engine's client writes it.

    Attributes:
        client: Where the request went.
        ids: Those that this client gave it, one for each choice.
    """

    __slots__ = ("_error", "_items", "_waiter", "client", "ids")

    def __init__(self, client: EngineClient, ids: range) -> None:
        self.client = client
        self.ids = ids
        self._items: deque[Output] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: EngineDead | None = None

    def put(self, output: Output) -> None:
        self._items.append(output)
        self._wake()

    def fail(self, error: EngineDead) -> None:
        self._error = error
        self._wake()

    async def get(self) -> list[Output]:
        """Return everything that has arrived since the last call, at least one output. Raises EngineDead."""
        while not self._items:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items = list(self._items)
        self._items.clear()
        return items

    def abort(self, ids: Sequence[int] | None = None) -> None:
        """Abort some of the choices, or all."""
        self.client.abort(self.ids if ids is None else ids)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineProcess:
    """An engine process without a model. It imports what it needs, which takes seconds, and answers questions."""

    def __init__(self, child: Child, connection: Connection) -> None:
        """Take over a process; use `spawn` to start one."""
        self._child = child
        self._connection = connection
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    @classmethod
    async def spawn(cls) -> EngineProcess:
        """Start a process. Raises OSError, and leaves nothing running then."""
        child = await Child.start("engine.process", "engine", Log(engine_log))
        try:
            return cls(child, await child.connect())
        except BaseException:
            await child.stop(0)
            raise

    async def ask(self, function: str, question: bytes) -> bytes:
        """Return what the function, "module:name", returns in the process.

        Raises:
            EngineDead: The process ended before it answered.
        """
        _send(self._connection, msgspec.msgpack.encode(Ask(function, question)))
        message = await self._receive()
        if not isinstance(message, Answer):
            raise EngineDead("the engine process ended while it was asked about the model")
        return message.answer

    async def load(self, config: EngineConfig, stuck_seconds: float = STUCK_SECONDS) -> EngineClient:
        """Load the model; returns when it has answered a test request. Do not use this object afterwards.

        If this fails, nothing is left running.

        Raises:
            ModelLoadError: The model cannot be loaded; the message contains the engine's reason.
            EngineDead: The process ended without a reason.
        """
        try:
            _send(self._connection, msgspec.msgpack.encode(config))
            async with weights_told(Path(config.model_path), lambda: (self._child.pid,)):
                first = await self._receive()
            if isinstance(first, Loaded):
                progress.current().begin(WARM_UP)
                first = await self._receive()
            if isinstance(first, Ready):
                return EngineClient(self._child, self._connection, first, stuck_seconds)
            if isinstance(first, LoadFailed):
                raise ModelLoadError(first.message)
            raise EngineDead("the engine process ended while it was loading the model; its log lines say why")
        except BaseException:
            await self.stop()
            raise

    @property
    def ended(self) -> bool:
        return self._child.returncode is not None

    async def stop(self) -> None:
        """Stop the process. Never raises; safe to call twice."""
        self._child.kill()
        await self._child.wait()

    async def _receive(self) -> FromEngine | None:
        frame = await self._connection.receive()
        return None if frame is None else self._decoder.decode(frame)


class EngineClient:
    """An engine process with its model, until it dies (see `processes.supervisor.Supervised`)."""

    def __init__(self, child: Child, connection: Connection, ready: Ready, stuck_seconds: float) -> None:
        """Take over a process; use `start` or `EngineProcess.load`.

        Attributes:
            ready: What the process reported when it had loaded the model.
            load_changed: Called when the process gets its first request, and when it has none any more.
        """
        self.ready = ready
        self.stats = Stats()
        """The last values that it reported; of a process that has died, only the counters."""
        self.served = False
        """Whether any request has received a token from this process."""
        self.load_changed: Callable[[], None] = lambda: None
        self._child = child
        self._connection = connection
        self._stuck_seconds = stuck_seconds
        self._streams: dict[int, OutputStream] = {}
        self._asked: float | None = None
        self._pongs: dict[int, asyncio.Future[None]] = {}
        self._next_id = 0
        self._died = asyncio.Event()
        self._encoder = msgspec.msgpack.Encoder()
        self._receiving = asyncio.create_task(self._receive(), name="engine-receive")

    @classmethod
    async def start(cls, config: EngineConfig) -> EngineClient:
        """Start a process and load the model. Raises OSError, and whatever `EngineProcess.load` raises."""
        return await (await EngineProcess.spawn()).load(config)

    @property
    def alive(self) -> bool:
        return not self._died.is_set()

    @property
    def num_requests(self) -> int:
        return len(self._streams)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def silent_for(self) -> float:
        """Seconds for which the answer to a ping has been outstanding; 0 when none is due."""
        return 0.0 if self._asked is None else time.monotonic() - self._asked

    def submit(self, add: Add) -> OutputStream:
        """Submit a request and return the stream in which the outputs of all its choices arrive.

        Raises:
            EngineDead: The process has ended.
            RequestRejected: The request cannot be sent.
        """
        if not self.alive:
            raise EngineDead("the engine process is not running")
        add.request_id = self._next_id
        try:
            body = self._encoder.encode(add)
        except (ValueError, OverflowError, TypeError) as error:
            raise RequestRejected("a number in the request is out of range") from error
        if len(body) > MAX_FRAME_BYTES:
            raise RequestRejected("the request's images are too large together")
        _send(self._connection, body)
        self._next_id += len(add.seeds)
        stream = OutputStream(self, add.choice_ids)
        idle = not self._streams
        self._streams.update(dict.fromkeys(stream.ids, stream))
        if idle:
            self.load_changed()
        return stream

    def abort(self, request_ids: Iterable[int]) -> None:
        """Have the engine drop the requests before its next step. Ignores finished ones and never raises."""
        held = [request_id for request_id in request_ids if self._streams.pop(request_id, None) is not None]
        if held and self.alive:
            with suppress(EngineDead):
                self._send(Abort(held))
                if not self._streams:
                    self.load_changed()

    def use_cores(self, share: float) -> None:
        """Have the engine use a part of the cores from its next step on. Never raises."""
        if self.alive:
            with suppress(EngineDead):
                self._send(Cores(share))

    async def ping(self, number: int, seconds: float) -> bool:
        """Whether the engine's loop answers within that many seconds. Never raises."""
        if not self.alive:
            return False
        pong = self._pongs[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(Ping(number))
            self._asked = time.monotonic()
            async with asyncio.timeout(seconds):
                await pong
        except (TimeoutError, EngineDead):
            return False
        finally:
            self._pongs.pop(number, None)
        return True

    async def wait_dead(self) -> None:
        """Wait until nothing more will arrive from the process."""
        await self._died.wait()

    async def lost(self) -> str:
        """Wait until the process has ended; a process whose loop has stopped is killed."""
        number, stuck = 0, self._stuck_seconds
        reason = ""
        while self.alive:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(PING_SECONDS, stuck)):
                    await self._died.wait()
            number += 1
            if self.alive and not await self.ping(number, stuck) and self.alive:
                reason = f"has not answered for {stuck:.0f} s: killed"
                self.kill()
                await self._died.wait()
        return reason or f"ended with code {await self._child.stop(SHUTDOWN_SECONDS)}"

    @property
    def returncode(self) -> int | None:
        """The process's exit code, negative for a signal; None while it runs."""
        return self._child.returncode

    def kill(self) -> None:
        """End the process at once; the requests that it holds fail with EngineDead."""
        self._child.kill()

    async def stop(self) -> None:
        """Ask the process to end, and kill it if it does not. Never raises."""
        self._bury(EngineStopped("the engine was stopped"))
        await self._child.stop(SHUTDOWN_SECONDS)
        await asyncio.wait({self._receiving}, timeout=1.0)
        self._receiving.cancel()

    async def _receive(self) -> None:
        decoder = msgspec.msgpack.Decoder(FromEngine)
        try:
            while (frame := await self._connection.receive()) is not None:
                self._handle(decoder.decode(frame))
        except Exception:
            logger.exception("what the engine process sent cannot be used; it is killed")
            self.kill()
        finally:
            self._bury(EngineDead("the engine process ended while it held this request"))

    def _handle(self, message: FromEngine) -> None:
        if isinstance(message, StepDone):
            self.stats = message.stats
            self._asked = None
            streams = self._streams
            for output in message.outputs:
                stream = (
                    streams.get(output.request_id)
                    if output.finish is None
                    else streams.pop(output.request_id, None)
                )
                if stream is not None:
                    stream.put(output)
                    self.served = self.served or bool(output.token_ids)
            if message.outputs and not streams:
                self.load_changed()
        elif isinstance(message, Pong):
            self.stats = message.stats
            self._asked = None
            pong = self._pongs.get(message.number)
            if pong is not None and not pong.done():
                pong.set_result(None)

    def _bury(self, error: EngineDead) -> None:
        """Fail everything that is still waiting. Has an effect only once."""
        if self._died.is_set():
            return
        self._died.set()
        self._asked = None
        self.stats = Stats(
            prefix_queries=self.stats.prefix_queries,
            prefix_hits=self.stats.prefix_hits,
            encoder_queries=self.stats.encoder_queries,
            encoder_hits=self.stats.encoder_hits,
            preemptions=self.stats.preemptions,
            steps=self.stats.steps,
            draft_tokens=self.stats.draft_tokens,
            accepted_tokens=self.stats.accepted_tokens,
        )
        for stream in self._streams.values():
            stream.fail(error)
        self._streams.clear()
        for pong in self._pongs.values():
            if not pong.done():
                pong.set_exception(error)

    def _send(self, message: ToEngine) -> None:
        _send(self._connection, self._encoder.encode(message))


def _send(connection: Connection, body: bytes) -> None:
    try:
        connection.send(body)
    except OSError as error:
        raise EngineDead("the engine process is going away") from error


SPARE_AFTER_SECONDS = 30.0
"""The pause before a spare process is started: it takes no time from a start and the first requests."""

SUSPECT_SECONDS = 10.0
"""An engine whose loop has been silent for this long gets no new requests while others respond."""

AFFINITY_SLACK = 4
"""How many more requests than the least loaded replica one may hold and still be preferred for what it has
cached."""

AFFINITY_KEYS = 4096
"""Remembered places of prefixes and images."""


class SpareProcess:
    """A process that has imported the engine and waits until another one has died."""

    def __init__(self, process: EngineProcess | None, pause: float | None) -> None:
        """Hold a process for the first replica. pause: see `EngineGroup.start`."""
        self._process = process
        self._pause = pause
        self._timer: asyncio.TimerHandle | None = None
        self._spawning: asyncio.Task[None] | None = None

    async def take(self) -> EngineProcess:
        """Return the process that waits, or a new one. Raises OSError."""
        if self._spawning is not None:
            await asyncio.wait({self._spawning})
        process, self._process = self._process, None
        if process is not None and process.ended:
            await process.stop()
            process = None
        return process or await EngineProcess.spawn()

    def replace(self) -> None:
        """Have the next one started after the pause, if none is waiting by then."""
        if self._pause is not None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(self._pause, self._begin)

    async def close(self) -> None:
        """Stop the process. Never raises; safe to call twice."""
        if self._timer is not None:
            self._timer.cancel()
        if self._spawning is not None:
            self._spawning.cancel()
            await asyncio.wait({self._spawning})
        process, self._process = self._process, None
        if process is not None:
            await process.stop()

    def _begin(self) -> None:
        if self._process is None and (self._spawning is None or self._spawning.done()):
            self._spawning = asyncio.create_task(self._spawn(), name="spare engine")

    async def _spawn(self) -> None:
        try:
            self._process = await EngineProcess.spawn()
        except OSError as error:
            logger.info("no spare engine process was started: %s", error)


class Replica:
    """A sequence of engine processes under one name."""

    def __init__(
        self,
        number: int,
        config: EngineConfig,
        spare: SpareProcess,
        *,
        retry_threshold: int,
        loading_seconds: float,
        stuck_seconds: float,
        changed: Callable[[], None],
        load_changed: Callable[[], None],
    ) -> None:
        self.number = number
        self.supervisor = Supervisor(
            f"replica {number}",
            self._start,
            retry_threshold=retry_threshold,
            start_seconds=loading_seconds,
            changed=changed,
        )
        self._config = config
        self._spare = spare
        self._stuck_seconds = stuck_seconds
        self._load_changed = load_changed
        self._client: EngineClient | None = None
        self._past = Stats()
        """The sum of the counters of earlier processes."""

    @property
    def client(self) -> EngineClient:
        """The client of the process that is running, or of the last one."""
        assert self._client is not None, "start() has not returned"
        return self._client

    @property
    def alive(self) -> bool:
        return self._client is not None and self._client.alive

    @property
    def stats(self) -> Stats:
        return self._past if self._client is None else _sum([self._past, self._client.stats])

    async def _start(self) -> EngineClient:
        client = await (await self._spare.take()).load(self._config, self._stuck_seconds)
        client.load_changed = self._load_changed
        self._past, self._client = self.stats, client
        self._spare.replace()
        return client


class EngineGroup:
    """Keeps the replicas running and distributes requests."""

    def __init__(
        self,
        configs: Sequence[EngineConfig],
        spare: SpareProcess,
        retry_threshold: int,
        loading_seconds: float,
        stuck_seconds: float,
    ) -> None:
        """Take over replicas; use `start` to start them."""
        self.replicas = [
            Replica(
                number,
                config,
                spare,
                retry_threshold=retry_threshold,
                loading_seconds=loading_seconds,
                stuck_seconds=stuck_seconds,
                changed=self._announce,
                load_changed=self._share_cores,
            )
            for number, config in enumerate(configs)
        ]
        self._spare = spare
        self._on_cpu = configs[0].devices[0] == "cpu"
        self._busy = 0
        """How many replicas have work."""
        self._change = asyncio.Event()
        self._places: OrderedDict[bytes, int] = OrderedDict()

    @classmethod
    async def start(
        cls,
        configs: Sequence[EngineConfig],
        *,
        retry_threshold: int = 3,
        loading_seconds: float = 1800.0,
        stuck_seconds: float = STUCK_SECONDS,
        spawned: EngineProcess | None = None,
        spare_after: float | None = None,
        wait_for_all: bool = True,
    ) -> EngineGroup:
        """Start the first replica, then the others at the same time. Raises what `EngineClient.start` raises.

        Args:
            configs: One for each replica.
            wait_for_all: Whether all must have started; else the others start in the background, and one that cannot
                is given up.
            retry_threshold: The number of failures of a replica, with no answered request between them, after which it
                is still restarted; it is given up after one more.
            loading_seconds: The time limit of one restart.
            stuck_seconds: A replica whose loop has been silent for this long is killed.
            spawned: A process that is waiting for its configuration, to become the first replica's.
            spare_after: The pause after a start before a spare process is started, in seconds; None for no spare.
        """
        group = cls(
            configs, SpareProcess(spawned, spare_after), retry_threshold, loading_seconds, stuck_seconds
        )
        try:
            first, *others = (replica.supervisor for replica in group.replicas)
            await first.start()
            if not wait_for_all:
                for other in others:
                    other.start_later()
                return group
            results = await asyncio.gather(*(other.start() for other in others), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
        except BaseException:
            await group.close()
            raise
        return group

    @property
    def ready(self) -> Ready:
        """What the first replica reported about itself."""
        return self.replicas[0].client.ready

    @property
    def restarts(self) -> int:
        return sum(replica.supervisor.restarts for replica in self.replicas)

    @property
    def alive(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.alive]

    @property
    def responsive(self) -> list[Replica]:
        """The replicas whose loop has answered recently."""
        return [replica for replica in self.alive if replica.client.silent_for < SUSPECT_SECONDS]

    @property
    def given_up(self) -> bool:
        """Whether every replica died too often, so that nothing will generate again."""
        return all(replica.supervisor.given_up for replica in self.replicas)

    @property
    def why_down(self) -> str:
        """Return why no replica is running, for health."""
        return why_down([replica.supervisor for replica in self.replicas], "the engine")

    async def changed(self) -> None:
        """Wait until a replica has died, come back, or been given up."""
        await self._change.wait()

    def submit(self, add: Add, keys: Sequence[bytes] = ()) -> OutputStream:
        """Send a request to one replica.

        Args:
            add: The request.
            keys: What the replica should preferably have cached (images, the prompt's beginning), most important first.

        Raises:
            EngineDead: No replica can take it.
            RequestRejected: It cannot be sent.
        """
        replica = self._choose(keys)
        stream = replica.client.submit(add)
        for key in keys:
            self._places[key] = replica.number
            self._places.move_to_end(key)
        while len(self._places) > AFFINITY_KEYS:
            self._places.popitem(last=False)
        return stream

    def stats(self) -> Stats:
        """Return the sum over the replicas; counters include processes that have died."""
        return _sum(replica.stats for replica in self.replicas)

    async def close(self) -> None:
        """End all processes. Never raises."""
        await asyncio.gather(*(replica.supervisor.close() for replica in self.replicas))
        await self._spare.close()

    def _choose(self, keys: Sequence[bytes]) -> Replica:
        alive = self.responsive or self.alive
        if not alive:
            raise EngineDead("no engine process is running")
        least = min(alive, key=lambda replica: replica.client.num_requests)
        for key in keys:
            number = self._places.get(key)
            if number is None:
                continue
            known = self.replicas[number]
            if known in alive and known.client.num_requests <= least.client.num_requests + AFFINITY_SLACK:
                return known
        return least

    def _share_cores(self) -> None:
        """Give all of a CPU's cores to the replicas that have work."""
        busy = sum(replica.client.num_requests > 0 for replica in self.alive)
        if busy != self._busy and len(self.replicas) > 1 and self._on_cpu:
            self._busy = busy
            for replica in self.alive:
                replica.client.use_cores(1.0 / max(1, busy))

    def _announce(self) -> None:
        self._busy = -1  # a new process does not know its share
        self._share_cores()
        self._change.set()
        self._change = asyncio.Event()


def _sum(parts: Iterable[Stats]) -> Stats:
    total = Stats()
    for part in parts:
        for name in Stats.__struct_fields__:
            setattr(total, name, getattr(total, name) + getattr(part, name))
    return total
