"""The LoRA adapters that vLLM has loaded: at the start, and as they come and go while it serves."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handlers.backends.adapters import AdapterInfo
from handlers.backends.vllm.adapters.directories import adapter_directory, check_name
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
from properties.secure_mode import OPEN, SecureMode

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""Pause between two looks at whether the engine that owes an answer still lives."""

_LONGEST_REASON = 300


def adapter_slots(arguments: Mapping[str, Any], most: int, *, cpu: bool) -> dict[str, int]:
    """vLLM's arguments for `most` adapters, one of which may be there twice while it is replaced.

    On a CPU, vLLM's kernels give requests without an adapter what is in the last place, which must stay empty: all
    adapters have a place there, the one that replaces another has one, and the last has none.
    """
    loras = int(arguments["max_loras"])
    return {"max_loras": max(loras, most) + 2 if cpu else loras, "max_cpu_loras": max(loras, most) + 2}


@dataclass(slots=True, eq=False)
class LoadedAdapter:
    """One loading of an adapter. request: vLLM's LoRARequest, its name and number used for nothing else ever.

    users: requests that hold it. free: set while there are none.
    """

    info: AdapterInfo
    path: Path
    request: Any
    users: int = 0
    free: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.free.set()

    def give_back(self) -> None:
        self.users -= 1
        if self.users == 0:
            self.free.set()


class VllmAdapters:
    """See `handlers.backends.adapters.AdapterStore`."""

    def __init__(
        self,
        vllm: Vllm,
        directories: Mapping[str, Path],
        most: int,
        engine: Callable[[], Any],
        *,
        home: Path,
        allowed: str = "",
        model_names: Collection[str] | None = None,
        secure: SecureMode = OPEN,
    ) -> None:
        """directories: of the adapters that are there from the start. most: how many may be added to.

        model_names: what the model itself may be called by; None for anything.
        engine: the one that serves now; raises Unavailable. home, allowed: where adapters may come from.
        """
        self._vllm = vllm
        self._most = most
        self._engine = engine
        self._home = home
        self._allowed = allowed
        self._model_names = model_names
        self._secure = secure
        self._numbers = itertools.count(1)
        self._changing = asyncio.Lock()
        self._changes: set[asyncio.Task[None]] = set()
        self._retiring: set[asyncio.Task[None]] = set()
        self._known = {
            name: self._numbered(AdapterInfo(name, f"adapters/{name}"), path)
            for name, path in directories.items()
        }
        self._places = max(most, len(self._known))

    def taken(self, adapter: str | None, model: str | None) -> LoadedAdapter | None:
        """The adapter that a request names, else one that its model is called like; to be given back.

        None for the model itself. Raises NotFound, which does not tell the others' names, also for a model that is
        neither: it may be an adapter that is misspelt or gone, and the answer of another would not be noticed.
        """
        if adapter is not None:
            found: LoadedAdapter | None = self._one(adapter)
        else:
            found = self._known.get(model or "")
            if not (found or not model or self._model_names is None or model in self._model_names):
                raise NotFound(
                    f"there is no model and no adapter {model[:80]!r}; /v1/models lists them", param="model"
                )
        if found is not None:
            found.users += 1
            found.free.clear()
        return found

    async def load(self, engine: Any, *, again: bool = False) -> None:
        """Have a new engine load each, so that a bad one is told now. Raises InvalidConfiguration.

        again: the engine replaces another; what it cannot load any more is forgotten, and the log says so.
        """
        for name, loaded in list(self._known.items()):
            try:
                await self._loaded(engine, loaded)
            except InvalidRequest as error:
                if not again:
                    raise InvalidConfiguration(
                        f"the adapter {name} cannot be loaded: {error.message}"
                    ) from error
                logger.error("adapter %s is gone: the new engine cannot load it (%s)", name, error.message)
                if self._known.get(name) is loaded:
                    del self._known[name]
            else:
                logger.info("adapter %s is loaded", name)

    def infos(self) -> Sequence[AdapterInfo]:
        return [loaded.info for loaded in self._known.values()]

    async def add(self, name: str, src: str, *, pin: bool = False) -> None:
        check_name(name)
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
        """Make a change to its end, also where its caller is cancelled."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._ended)
        await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # Told to the caller; where that has left, to nobody.

    async def _add(self, info: AdapterInfo) -> None:
        async with self._changing:
            if info.name in self._known:
                raise Conflict(
                    f"there is an adapter {info.name!r} already; update it, or choose another name",
                    param="name",
                )
            if len(self._known) >= self._most:
                raise InsufficientStorage(
                    f"No free lora slots: {self._most} adapters are loaded; remove one, or raise "
                    "option.max_cpu_loras"
                )
            self._known[info.name] = await self._new(info)
        logger.info("adapter %s is loaded", info.name)

    async def _update(self, name: str, src: str | None, pin: bool | None) -> None:
        async with self._changing:
            old = self._one(name)
            new = await self._new(
                AdapterInfo(name, old.info.src if src is None else src, old.info.pin if pin is None else pin)
            )
            self._known[name] = new
            self._retire(old)
        logger.info("adapter %s is loaded anew", name)

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
        path = await asyncio.to_thread(adapter_directory, info.src, self._home, self._allowed)
        if forbidden := await asyncio.to_thread(lambda: list(self._secure.files(path))):
            for problem in forbidden:
                logger.warning("adapter %s: %s", info.name, problem)
            raise InvalidRequest(
                "src: the adapter has a file that SageMaker's secure mode forbids", param="src"
            )
        loaded = self._numbered(info, path)
        await self._loaded(self._engine(), loaded)
        return loaded

    def _numbered(self, info: AdapterInfo, path: Path) -> LoadedAdapter:
        # vLLM finds cached keys and values again by the name.
        number = next(self._numbers)
        return LoadedAdapter(info, path, self._vllm.LoRARequest(f"{info.name}#{number}", number, str(path)))

    async def _loaded(self, engine: Any, adapter: LoadedAdapter) -> None:
        """Have the engine load it. Raises InvalidRequest with vLLM's reason, and Unavailable."""
        try:
            loaded = await self._answer(engine, engine.add_lora(adapter.request))
        except (ServingError, asyncio.CancelledError):
            raise
        except Exception as error:
            await self._dropped(engine, adapter)
            if (what := shortage(error)) is not None:
                raise short_of(what) from error
            raise InvalidRequest(f"src: {_reason(error, adapter)}", param="src") from error
        if not loaded:
            await self._dropped(engine, adapter)
            raise InvalidRequest("src: the engine cannot load it; its log says why", param="src")
        if adapter.info.pin and self._may_pin(engine):
            try:
                await self._answer(engine, engine.pin_lora(adapter.request.lora_int_id))
            except (ServingError, asyncio.CancelledError):
                raise
            except Exception as error:
                await self._dropped(engine, adapter)
                raise EngineFailed("the engine cannot pin the adapter; load it without pin") from error

    def _may_pin(self, engine: Any) -> bool:
        """Whether there is a place on the device for each adapter, and for one that replaces another.

        vLLM takes a pinned adapter's place from the batches of the others, but makes these as large as before: where
        places are short, one of a batch could be without.
        """
        return int(engine.vllm_config.lora_config.max_loras) > self._places

    def _retire(self, adapter: LoadedAdapter) -> asyncio.Task[None]:
        """Have the engine let go of it when the last request has."""
        task = asyncio.create_task(self._retired(adapter))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return task

    async def _retired(self, adapter: LoadedAdapter) -> None:
        # Until then vLLM might look for its files again.
        await adapter.free.wait()
        try:
            engine = self._engine()
        except Unavailable:
            return  # With the engine that had it, it is gone.
        await self._dropped(engine, adapter)

    async def _dropped(self, engine: Any, adapter: LoadedAdapter) -> None:
        try:
            await self._answer(engine, engine.remove_lora(adapter.request.lora_int_id))
        except Exception as error:
            logger.warning("vLLM did not let go of adapter %s: %s", adapter.info.name, error)

    async def _answer(self, engine: Any, question: Coroutine[Any, Any, Any]) -> Any:
        """vLLM's answer; where its process dies it would never come. Raises Unavailable then."""
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
    """The last line of what vLLM says, without the directory's path."""
    lines = str(error.__cause__ or error).strip().splitlines()
    told = lines[-1] if lines else type(error).__name__
    return told.replace(str(adapter.path), "the directory")[:_LONGEST_REASON]
