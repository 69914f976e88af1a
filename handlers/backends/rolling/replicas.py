"""The replicas of one model, each an engine process: how many run, which gets a request, and how they share cores."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from engine.config import EngineConfig
from engine.errors import EngineDead
from engine.messages import Add, Ready, Stats
from handlers.backends.rolling.engine_client import STUCK_SECONDS, EngineClient, EngineProcess, OutputStream
from processes.supervisor import Supervisor, why_down

logger = logging.getLogger(__name__)

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
        """Hold a process for the first replica. pause: see `EngineGroup`."""
        self._process = process
        self._pause = pause
        self._timer: asyncio.TimerHandle | None = None
        self._spawning: asyncio.Task[None] | None = None

    async def take(self) -> EngineProcess:
        """Return the process that waits, or a new one. Raises OSError."""
        if self._spawning is not None:
            await asyncio.wait({self._spawning})
        process, self._process = self._process, None
        if process is not None and process.returncode is not None:
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
        *,
        retry_threshold: int = 3,
        loading_seconds: float = 1800.0,
        stuck_seconds: float = STUCK_SECONDS,
        spawned: EngineProcess | None = None,
        spare_after: float | None = None,
    ) -> None:
        """Prepare to run replicas; `start` starts them.

        Args:
            configs: One for each replica.
            retry_threshold: The number of failures of a replica, with no answered request between them, after which it
                is still restarted; it is given up after one more.
            loading_seconds: The time limit of one restart.
            stuck_seconds: A replica whose loop has been silent for this long is killed.
            spawned: A process that is waiting for its configuration, to become the first replica's.
            spare_after: The pause after a start before a spare process is started, in seconds; None for no spare.
        """
        self.configs = configs
        self._spare = SpareProcess(spawned, spare_after)
        self.replicas = [
            Replica(
                number,
                config,
                self._spare,
                retry_threshold=retry_threshold,
                loading_seconds=loading_seconds,
                stuck_seconds=stuck_seconds,
                changed=self._announce,
                load_changed=self._share_cores,
            )
            for number, config in enumerate(configs)
        ]
        self._on_cpu = configs[0].devices[0] == "cpu"
        self._busy = 0
        """How many replicas have work."""
        self._change = asyncio.Event()
        self._places: OrderedDict[bytes, int] = OrderedDict()

    async def start(self, *, wait_for_all: bool = True) -> None:
        """Start the first replica, then the others at the same time.

        If this fails, nothing is left running. Raises what `EngineProcess.load` raises, and OSError.

        Args:
            wait_for_all: Whether all must have started; else the others start in the background, and one that cannot
                is given up.
        """
        first, *others = (replica.supervisor for replica in self.replicas)
        try:
            await first.start()
            if not wait_for_all:
                for other in others:
                    other.start_later()
                return
            results = await asyncio.gather(*(other.start() for other in others), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
        except BaseException:
            await self.close()
            raise

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
