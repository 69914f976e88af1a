"""The LoRA adapters that vLLM has loaded: added, replaced and removed one after the other while it serves."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handlers.backends.adapters import AdapterFiles, AdapterInfo, check_adapter_name
from handlers.backends.vllm.compat import Vllm
from handlers.errors import (
    Conflict,
    EngineFailed,
    InsufficientStorage,
    InvalidConfiguration,
    InvalidRequest,
    NotFound,
    ServingError,
    Unavailable,
    short_of,
)
from processes.shortage import shortage

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""How often an engine that owes an answer is checked."""

_LONGEST_REASON = 300


def adapter_slots(arguments: Mapping[str, Any], most: int, *, cpu: bool) -> dict[str, int]:
    """Return vLLM's arguments for `most` adapters, one of which may be loaded twice while it is replaced.

    On a CPU, vLLM's kernels apply the last slot to requests without an adapter, so it must stay empty: there each
    adapter has a slot, the one that replaces another has one, and the last has none.
    """
    loras = int(arguments["max_loras"])
    return {"max_loras": max(loras, most) + 2 if cpu else loras, "max_cpu_loras": max(loras, most) + 2}


@dataclass(slots=True, eq=False)
class LoadedAdapter:
    """One load of an adapter.

    Attributes:
        info: What clients see of it.
        path: Its directory.
        request: vLLM's LoRARequest, whose name and number are never used again: vLLM finds cached keys and values by
            the name.
        users: The requests that use it.
        free: Set while there are none.
    """

    info: AdapterInfo
    path: Path
    request: Any
    users: int = 0
    free: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.free.set()

    def take(self) -> None:
        self.users += 1
        self.free.clear()

    def give_back(self) -> None:
        self.users -= 1
        if self.users == 0:
            self.free.set()


class VllmAdapters:
    """See `handlers.backends.adapters.AdapterStore`."""

    def __init__(
        self,
        vllm: Vllm,
        files: AdapterFiles,
        directories: Mapping[str, Path],
        most: int,
        engine: Callable[[], Any],
        model_names: Collection[str] | None = None,
    ) -> None:
        """Know the first adapters; `load` loads them.

        Args:
            vllm: The imported names.
            files: What else may be loaded.
            directories: The adapters that are there from the start.
            most: How many there may be.
            engine: Returns the engine that serves now, or raises Unavailable.
            model_names: The model's own names; None if any name means the model.
        """
        self._vllm = vllm
        self._files = files
        self._most = most
        self._engine = engine
        self._model_names = model_names
        self._numbers = itertools.count(1)
        self._changing = asyncio.Lock()
        self._changes: set[asyncio.Task[None]] = set()
        self._retiring: set[asyncio.Task[None]] = set()
        self._known = {
            name: self._numbered(AdapterInfo(name, f"adapters/{name}"), path) for name, path in directories.items()
        }
        self._places = max(most, len(self._known))

    def taken(self, adapter: str | None, model: str | None) -> LoadedAdapter | None:
        """Return the adapter that a request names, also as its model; it must be given back. None for the model itself.

        A name that is neither an adapter nor the model may be an adapter that is misspelt or gone, and a completion by
        another one would not be noticed: NotFound is raised. Its message does not list the others.
        """
        if adapter is not None:
            found: LoadedAdapter | None = self._one(adapter)
        else:
            found = self._known.get(model or "")
            if not (found or not model or self._model_names is None or model in self._model_names):
                raise NotFound(f"there is no model and no adapter {model[:80]!r}; /v1/models lists them", param="model")
        if found is not None:
            found.take()
        return found

    async def load(self, engine: Any, *, again: bool = False) -> None:
        """Load all adapters into a new engine. Raises InvalidConfiguration if the first engine cannot load one.

        If the engine replaces another one (`again`), an adapter that it cannot load is forgotten, and that is logged.
        """
        for name, loaded in list(self._known.items()):
            try:
                await self._loaded(engine, loaded)
            except InvalidRequest as error:
                if not again:
                    raise InvalidConfiguration(f"the adapter {name} cannot be loaded: {error.message}") from error
                logger.error("adapter %s is gone: the new engine cannot load it (%s)", name, error.message)
                if self._known.get(name) is loaded:
                    del self._known[name]
            else:
                logger.info("adapter %s is loaded", name)

    def infos(self) -> Sequence[AdapterInfo]:
        return [loaded.info for loaded in self._known.values()]

    async def add(self, name: str, src: str, *, pin: bool = False) -> None:
        check_adapter_name(name)
        await self._through(self._add(AdapterInfo(name, src, pin)))

    async def update(self, name: str, src: str | None = None, *, pin: bool | None = None) -> None:
        self._one(name)
        await self._through(self._update(name, src, pin))

    async def remove(self, name: str) -> None:
        self._one(name)
        await self._through(self._remove(name))

    def close(self) -> None:
        for task in (*self._changes, *self._retiring):
            task.cancel()

    async def _through(self, change: Coroutine[Any, Any, None]) -> None:
        """Complete a change even if its caller is cancelled."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._ended)
        await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # The caller has seen it, or has left; asyncio would log it.

    async def _add(self, info: AdapterInfo) -> None:
        async with self._changing:
            if info.name in self._known:
                raise Conflict(
                    f"there is an adapter {info.name!r} already; update it, or choose another name", param="name"
                )
            if len(self._known) >= self._most:
                raise InsufficientStorage(
                    f"No free lora slots: {self._most} adapters are loaded; remove one, or raise option.max_cpu_loras"
                )
            self._known[info.name] = await self._new(info)
        logger.info("adapter %s is loaded", info.name)

    async def _update(self, name: str, src: str | None, pin: bool | None) -> None:
        async with self._changing:
            old = self._one(name)
            pinned = old.info.pin if pin is None else pin
            new = await self._new(AdapterInfo(name, old.info.src if src is None else src, pinned))
            self._known[name] = new
            self._retire(old)
        logger.info("adapter %s is loaded again", name)

    async def _remove(self, name: str) -> None:
        async with self._changing:
            self._engine()
            gone = self._retire(self._one(name))
            del self._known[name]
        await gone
        logger.info("adapter %s is removed", name)

    def _one(self, name: str) -> LoadedAdapter:
        if name not in self._known:
            raise NotFound(f"there is no adapter {name[:80]!r}", param="adapters")
        return self._known[name]

    async def _new(self, info: AdapterInfo) -> LoadedAdapter:
        while len(self._known) + len(self._retiring) > self._places:
            await asyncio.wait(self._retiring, return_when=asyncio.FIRST_COMPLETED)
        loaded = self._numbered(info, await asyncio.to_thread(self._files.named, info))
        await self._loaded(self._engine(), loaded)
        return loaded

    def _numbered(self, info: AdapterInfo, path: Path) -> LoadedAdapter:
        number = next(self._numbers)
        return LoadedAdapter(info, path, self._vllm.LoRARequest(f"{info.name}#{number}", number, str(path)))

    async def _loaded(self, engine: Any, adapter: LoadedAdapter) -> None:
        """Have the engine load it. Raises InvalidRequest with vLLM's reason, and Unavailable."""
        what = "load"
        try:
            if not await self._answer(engine, engine.add_lora(adapter.request)):
                raise RuntimeError("the engine cannot load it; its log says why")
            # vLLM takes the slot of a pinned adapter from the batches of the others, but does not make these smaller:
            # where slots are short, an adapter of a batch could be without one.
            if adapter.info.pin and int(engine.vllm_config.lora_config.max_loras) > self._places:
                what = "pin"
                await self._answer(engine, engine.pin_lora(adapter.request.lora_int_id))
        except (ServingError, asyncio.CancelledError):
            raise
        except Exception as error:
            await self._dropped(engine, adapter)
            if what == "pin":
                raise EngineFailed("the engine cannot pin the adapter; load it without pin") from error
            if (short := shortage(error)) is not None:
                raise short_of(short) from error
            raise InvalidRequest(f"src: {_reason(error, adapter)}", param="src") from error

    def _retire(self, adapter: LoadedAdapter) -> asyncio.Task[None]:
        """Have the engine release an adapter after its last request."""
        task = asyncio.create_task(self._retired(adapter))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return task

    async def _retired(self, adapter: LoadedAdapter) -> None:
        await adapter.free.wait()  # until then vLLM may read its files again
        try:
            engine = self._engine()
        except Unavailable:
            return  # it is gone with the engine that had it
        await self._dropped(engine, adapter)

    async def _dropped(self, engine: Any, adapter: LoadedAdapter) -> None:
        try:
            await self._answer(engine, engine.remove_lora(adapter.request.lora_int_id))
        except Exception as error:
            logger.warning("vLLM did not release adapter %s: %s", adapter.info.name, error)

    async def _answer(self, engine: Any, question: Coroutine[Any, Any, Any]) -> Any:
        """Return vLLM's answer, which never comes if its process dies. Raises Unavailable then."""
        asking = asyncio.ensure_future(question)
        try:
            while not asking.done() and not engine.errored:
                await asyncio.wait({asking}, timeout=LOOK_SECONDS)
            if asking.done():
                return await asking
        except self._vllm.EngineDeadError:
            pass
        finally:
            asking.cancel()
        raise Unavailable("the engine process died meanwhile; try again", retry_after=5)


def _reason(error: Exception, adapter: LoadedAdapter) -> str:
    """Return the last line of vLLM's message, without the directory's path."""
    lines = str(error.__cause__ or error).strip().splitlines()
    reason = lines[-1] if lines else type(error).__name__
    return reason.replace(str(adapter.path), "the directory")[:_LONGEST_REASON]
