"""Replicas of one model: who gets a request, and what happens when one of them dies."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence

from engine.client import EngineClient, OutputStream
from engine.config import EngineConfig
from engine.errors import EngineDead
from engine.messages import Add, Ready, Stats
from processes.restarts import Restarts

logger = logging.getLogger(__name__)

PING_SECONDS = 2.0
"""Pause between two looks at whether an engine's loop still turns."""

SUSPECT_SECONDS = 10.0
"""An engine whose loop has not turned for this long gets no new requests while others are well."""

STUCK_SECONDS = 120.0
"""An engine whose loop has not turned for this long is killed and restarted. A step is one turn, so this must be
longer than the longest step."""

AFFINITY_SLACK = 4
"""How many more requests than the least loaded replica one may hold and still be preferred for what it has
cached."""

AFFINITY_KEYS = 4096
"""Remembered places of prefixes and pictures."""


class Replica:
    """One engine process after another under one name."""

    def __init__(self, number: int, config: EngineConfig, retry_threshold: int) -> None:
        self.number = number
        self.config = config
        self.client = EngineClient(config)
        self.restarts = Restarts(retry_threshold)
        self.given_up = False
        self.lost = Stats()
        """The counters of the processes that died."""

    def retire(self) -> None:
        """Note the counters of the process that died, and make a place for the next one."""
        for name in (
            "prefix_queries",
            "prefix_hits",
            "encoder_queries",
            "encoder_hits",
            "preemptions",
            "steps",
        ):
            setattr(self.lost, name, getattr(self.lost, name) + getattr(self.client.stats, name))
        self.client = EngineClient(self.config)


class Ticket:
    """A submitted request: where it went, the ids of its answers, and where their outputs come."""

    __slots__ = ("client", "ids", "stream")

    def __init__(self, client: EngineClient, stream: OutputStream, ids: range) -> None:
        self.client = client
        self.stream = stream
        self.ids = ids

    def abort(self, ids: Sequence[int] | None = None) -> None:
        """Some of the answers, or all."""
        self.client.abort(self.ids if ids is None else ids)


class EngineGroup:
    """Starts the replicas, keeps them running, and hands out requests."""

    def __init__(
        self,
        configs: Sequence[EngineConfig],
        *,
        retry_threshold: int = 3,
        loading_seconds: float = 1800.0,
        stuck_seconds: float = STUCK_SECONDS,
        spawned: EngineClient | None = None,
    ) -> None:
        """retry_threshold: failures of a replica, with no answered request between them, that a restart
        answers; after one more it is given up. loading_seconds: what one restart may take. spawned: a process that
        waits for its configuration, to be the first replica's."""
        self._loading_seconds = loading_seconds
        self._stuck_seconds = stuck_seconds
        self.replicas = [Replica(number, config, retry_threshold) for number, config in enumerate(configs)]
        if spawned is not None:
            spawned.config = configs[0]
            self.replicas[0].client = spawned
        self.restarts = 0
        self.facts: Ready | None = None
        """What the first replica that came up said of itself."""
        self._change = asyncio.Event()
        self._places: OrderedDict[bytes, int] = OrderedDict()
        self._keepers: list[asyncio.Task[None]] = []
        self._closing = False

    async def start(self) -> Ready:
        """All replicas, one after the other up to the first, then together. Raises EngineError when one fails."""
        first, *others = self.replicas
        self.facts = await first.client.start()
        results = await asyncio.gather(*(r.client.start() for r in others), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                await self.close()
                raise result
        self._keepers = [
            asyncio.create_task(work(replica))
            for replica in self.replicas
            for work in (self._keep, self._watch)
        ]
        return self.facts

    @property
    def alive(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.client.alive]

    @property
    def responsive(self) -> list[Replica]:
        """Those whose loop has turned lately."""
        return [replica for replica in self.alive if replica.client.silent_for < SUSPECT_SECONDS]

    @property
    def given_up(self) -> bool:
        """Every replica died too often; nothing will generate again."""
        return all(replica.given_up for replica in self.replicas)

    @property
    def why_down(self) -> str:
        """For health, while no replica runs."""
        waiting = [replica.restarts for replica in self.replicas if not replica.given_up]
        short = [restarts for restarts in waiting if restarts.short is not None]
        return (short or waiting or [self.replicas[0].restarts])[0].reason("the engine")

    async def changed(self) -> None:
        """Return when next a replica has died, come back, or been given up."""
        await self._change.wait()

    def submit(self, add: Add, keys: Sequence[bytes] = ()) -> Ticket:
        """Send a request to one replica. Raises EngineDead when none can take it, and RequestRejected.

        keys: what the replica would profit from having seen, most telling first (pictures, the prompt's
        beginning).
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
        """Summed over the replicas; counters include the processes that died."""
        total = Stats()
        for replica in self.replicas:
            parts = [replica.lost, replica.client.stats] if replica.client.alive else [replica.lost]
            for part in parts:
                for name in Stats.__struct_fields__:
                    setattr(total, name, getattr(total, name) + getattr(part, name))
        return total

    async def close(self) -> None:
        """End all processes. Never raises."""
        self._closing = True
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(replica.client.stop() for replica in self.replicas), return_exceptions=True)

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

    async def _keep(self, replica: Replica) -> None:
        """Restart the replica's process whenever it dies, until it dies too often."""
        try:
            while not self._closing:
                await replica.client.wait_dead()
                served = replica.client.answered
                await replica.client.stop()
                code = replica.client.returncode
                replica.retire()
                replica.restarts.died(served=served)
                self._announce()
                logger.error("engine process of replica %d ended with code %s", replica.number, code)
                if not await self._restart(replica):
                    return
        finally:
            replica.given_up = True
            self._announce()

    async def _restart(self, replica: Replica) -> bool:
        """Try until it is back, or has failed too often."""
        while not replica.restarts.exhausted:
            await asyncio.sleep(replica.restarts.pause)
            self.restarts += 1
            try:
                async with asyncio.timeout(self._loading_seconds):
                    await replica.client.start()
            except Exception as error:
                logger.error(
                    "replica %d did not start again: %s", replica.number, error or type(error).__name__
                )
                replica.retire()
                replica.restarts.failed(error)
            else:
                replica.restarts.succeeded()
                logger.info("replica %d is back", replica.number)
                self._announce()
                return True
        logger.critical("replica %d is given up after %d failures", replica.number, replica.restarts.failures)
        return False

    async def _watch(self, replica: Replica) -> None:
        """Kill the replica's process when its loop has stopped turning; `_keep` does the rest."""
        number = 0
        while not self._closing:
            await asyncio.sleep(min(PING_SECONDS, self._stuck_seconds))
            client, number = replica.client, number + 1
            if client.alive and not await client.ping(number, self._stuck_seconds) and client.alive:
                logger.error(
                    "replica %d has not answered for %.0f s: killed", replica.number, self._stuck_seconds
                )
                client.kill()
                await client.wait_dead()
