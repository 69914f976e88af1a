"""The replicas of one model: which of them gets a request, and what happens when one dies."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from engine.config import EngineConfig
from engine.errors import EngineDead
from engine.messages import Add, Ready, Stats
from handlers.backends.rolling.client import STUCK_SECONDS, EngineClient, EngineProcess, OutputStream
from processes.supervisor import Supervisor, why_down

SUSPECT_SECONDS = 10.0
"""An engine whose loop has been silent for this long gets no new requests while others respond."""

AFFINITY_SLACK = 4
"""How many more requests than the least loaded replica one may hold and still be preferred for what it has
cached."""

AFFINITY_KEYS = 4096
"""Remembered places of prefixes and images."""


class Replica:
    """A sequence of engine processes under one name."""

    def __init__(
        self,
        number: int,
        config: EngineConfig,
        spawned: EngineProcess | None,
        *,
        retry_threshold: int,
        loading_seconds: float,
        stuck_seconds: float,
        changed: Callable[[], None],
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
        self._spawned = spawned
        self._stuck_seconds = stuck_seconds
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
        process, self._spawned = self._spawned, None
        client = await (process or await EngineProcess.spawn()).load(self._config, self._stuck_seconds)
        self._past, self._client = self.stats, client
        return client


class Ticket:
    """A submitted request: where it went, the ids of its choices, and the stream of their outputs."""

    __slots__ = ("client", "ids", "stream")

    def __init__(self, client: EngineClient, stream: OutputStream, ids: range) -> None:
        self.client = client
        self.stream = stream
        self.ids = ids

    def abort(self, ids: Sequence[int] | None = None) -> None:
        """Abort some of the choices, or all."""
        self.client.abort(self.ids if ids is None else ids)


class EngineGroup:
    """Keeps the replicas running and distributes requests."""

    def __init__(
        self,
        configs: Sequence[EngineConfig],
        spawned: EngineProcess | None,
        retry_threshold: int,
        loading_seconds: float,
        stuck_seconds: float,
    ) -> None:
        """Take over replicas; use `start` to start them."""
        self.replicas = [
            Replica(
                number,
                config,
                None if number else spawned,
                retry_threshold=retry_threshold,
                loading_seconds=loading_seconds,
                stuck_seconds=stuck_seconds,
                changed=self._announce,
            )
            for number, config in enumerate(configs)
        ]
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
    ) -> EngineGroup:
        """Start the first replica, then the others at the same time. Raises what `EngineClient.start` raises.

        Args:
            configs: One for each replica.
            retry_threshold: The number of failures of a replica, with no answered request between them, after which it
                is still restarted; it is given up after one more.
            loading_seconds: The time limit of one restart.
            stuck_seconds: A replica whose loop has been silent for this long is killed.
            spawned: A process that is waiting for its configuration, to become the first replica's.
        """
        group = cls(configs, spawned, retry_threshold, loading_seconds, stuck_seconds)
        try:
            first, *others = (replica.supervisor for replica in group.replicas)
            await first.start()
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

    def submit(self, add: Add, keys: Sequence[bytes] = ()) -> Ticket:
        """Send a request to one replica.

        Args:
            add: The request.
            keys: What the replica should preferably have cached (images, the prompt's beginning), most important first.

        Raises:
            EngineDead: No replica can take it.
            RequestRejected: It cannot be sent.
        """
        replica = self._choose(keys)
        client, stream = replica.client, OutputStream()
        ids = client.submit(add, stream)
        for key in keys:
            self._places[key] = replica.number
            self._places.move_to_end(key)
        while len(self._places) > AFFINITY_KEYS:
            self._places.popitem(last=False)
        return Ticket(client, stream, ids)

    def stats(self) -> Stats:
        """Return the sum over the replicas; counters include processes that have died."""
        return _sum(replica.stats for replica in self.replicas)

    async def close(self) -> None:
        """End all processes. Never raises."""
        await asyncio.gather(*(replica.supervisor.close() for replica in self.replicas))

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

    def _announce(self) -> None:
        self._change.set()
        self._change = asyncio.Event()


def _sum(parts: Iterable[Stats]) -> Stats:
    total = Stats()
    for part in parts:
        for name in Stats.__struct_fields__:
            setattr(total, name, getattr(total, name) + getattr(part, name))
    return total
