"""The models of a server of several: what is loaded, the memory it takes, the model of a request, and the routes."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Literal

import msgspec

from container.models.messages import Prepared
from container.models.model import Model, no_such_model, retrieve_failure
from container.models.prepare import SUFFIXES
from engine.machine import host_memory
from handlers.artefacts import local_path
from handlers.artefacts.fetch import download_root
from handlers.backends.base import BackendStats, Capabilities, Health
from handlers.errors import Conflict, InsufficientStorage, InvalidRequest, NotFound, ServingError, stopping
from handlers.protocols.base import READ, Route, struct_reply
from handlers.protocols.body import SHORT_BYTES, read_options
from handlers.protocols.lmi.adapters import page_of
from handlers.protocols.lmi.replies import LmiError
from handlers.request import Incoming, Reply
from properties.configuration import Configuration

logger = logging.getLogger(__name__)

_TARGET = "x-amzn-sagemaker-target-model"
_NAME = re.compile(r"[\w][\w.-]{0,127}", re.ASCII)
_SHARE = 0.9
"""The part of the container's memory that models may take if no option says so."""

_METRICS_SECONDS = 2.0
"""How long the metrics of one model are waited for."""

_OF_EACH = {"multi_model": "false", "page": "false", "drain_timeout": "1"}
"""Options of the models' servers. Requests are drained before one of them is told to end."""

_OF_THE_CONTAINER = frozenset({"host", "port", "api_key", "cors_allowed_origin", "cors_allow_origin", *_OF_EACH})
"""Options of the command line that are not passed on to the models' servers."""


REGISTRY = "registry"
"""The action of these routes."""


class LoadBody(msgspec.Struct):
    """Loads a model. url: a directory or an archive on this machine. model_name: default: the last part of the url."""

    url: str | None = None
    model_name: str | None = None


class LoadedModel(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """One model. status: LMI's; IDLE: its next request loads it again."""

    model_name: str
    model_url: str
    status: Literal["PENDING", "READY", "IDLE"]


class LoadedModels(msgspec.Struct, forbid_unknown_fields=True, rename="camel", omit_defaults=True):
    """A page of models. next_page_token: only if there are more."""

    models: list[LoadedModel]
    next_page_token: str | None = None


class ModelStatus(msgspec.Struct, forbid_unknown_fields=True):
    """Says what has been done."""

    status: str


class _Named(msgspec.Struct):
    """The part of a request's body that is read here."""

    model: str | None = None


class Models:
    """The loaded models. For the rest of the server they are both the backend and the service.

    Attributes:
        free: As for any service. Each model's own server has its own queue.
        adapters: None, since the adapters of a model belong to its server.
    """

    free = sys.maxsize
    adapters = None

    def __init__(self, configuration: Configuration) -> None:
        self._settings = settings = configuration.settings
        self._store = Path(configuration.model_location.value)
        self._options = [
            option
            for option in configuration.of_the_command_line()
            if option.partition("=")[0].removeprefix("option.") not in _OF_THE_CONTAINER
        ] + [f"{name}={value}" for name, value in _OF_EACH.items()]
        most = settings.models_memory_mb
        self._memory = int(host_memory() * _SHARE) if most is None else most * 2**20
        self._models: dict[str, Model] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._preparing = asyncio.Lock()
        self._place: Path | None = None
        self._sockets = ""
        self._closing = False

    @property
    def names(self) -> list[str]:
        """The names of the models that are loaded, or being loaded."""
        return list(self._models)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(max_model_len=0, images=True)

    def health(self) -> Health:
        return Health(True, "ready")

    def stats(self) -> BackendStats:
        return BackendStats()

    def needs_no_place(self, route: str, size: int, content: bytes | None = None) -> bool:
        return True

    async def load(self) -> None:
        """Load what the configured directory holds. Raises ServingError, naming the model that cannot be loaded."""
        root = download_root(self._settings.download_dir)
        self._place = Path(tempfile.mkdtemp(prefix="models-", dir=root))
        self._sockets = tempfile.mkdtemp(prefix="lmi-")  # not below `_place`: a socket's path is short
        found = sorted(self._store.iterdir()) if self._store.is_dir() else []
        for path in found:
            if path.name.startswith(".") or not (path.is_dir() or path.name.endswith(SUFFIXES)):
                continue
            try:
                await self._add(_name_of(path.name), str(path), path)
            except ServingError as error:
                raise ServingError(f"model {path.name}: {error.message}") from error

    async def close(self) -> None:
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *(model.close() for model in self._models.values()), return_exceptions=True)
        if self._place is not None:
            for place in (self._place, self._sockets):
                await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)

    async def answer(self, incoming: Incoming) -> Reply:
        """Have a request answered by its model. Raises ServingError."""
        return await (await self._chosen(incoming)).answer(incoming)

    async def call(self, action: str, incoming: Incoming) -> Reply:
        """List, describe, load or unload models, or have a model's server answer. Raises ServingError."""
        if action != REGISTRY:
            return await self.answer(incoming)
        if incoming.method == "POST":
            return await self._load(incoming)
        if incoming.model is None:
            shown, token = page_of(list(self._models.values()), incoming.query)
            return struct_reply(LoadedModels([_shown(model) for model in shown], token))
        if incoming.method in READ:
            return struct_reply(_shown(self._get(incoming.model)))
        await asyncio.shield(self._background(self._unload(self._get(incoming.model))))
        return struct_reply(ModelStatus(f'Model or workflow "{incoming.model}" unregistered'))

    async def metrics(self) -> dict[str, str]:
        """Return what the server of each running model exports for Prometheus, by the model's name."""
        models = [model for model in self._models.values() if model.status == "READY"]
        asked = (asyncio.wait_for(model.metrics(), _METRICS_SECONDS) for model in models)
        texts = await asyncio.gather(*asked, return_exceptions=True)
        return {model.name: text for model, text in zip(models, texts, strict=True) if isinstance(text, str)}

    async def _chosen(self, incoming: Incoming) -> Model:
        """Return the model that the path or the query, the header or the body names, or else the only one."""
        name = incoming.model
        if name is None and (target := incoming.headers.get(_TARGET)):
            name = target if target in self._models else _name_of(target)
            if name not in self._models:
                raise no_such_model(target)
        if name is None and incoming.size:
            name = await _in_body(incoming)
        if name in self._models:
            return self._models[name]
        if len(self._models) == 1:
            return next(iter(self._models.values()))
        raise NotFound(
            "Parameter model_name is required: several models may be loaded here; use /models/NAME/invoke, name one as "
            "model in the body or in the header X-Amzn-SageMaker-Target-Model, or load one by POST /models"
        )

    async def _load(self, incoming: Incoming) -> Reply:
        given = read_options(incoming, LoadBody)
        url = incoming.query.get("url", given.url)
        if not url:
            raise InvalidRequest("Parameter url is required.", param="url")
        name = incoming.query.get("model_name", given.model_name) or _name_of(url)
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"model_name {name[:80]!r}: allowed are letters, digits, `_`, `.` and `-`, 128 characters at most",
                param="model_name",
            )
        path = await asyncio.to_thread(self._source, url)
        load = self._background(self._add(name, url, path))
        if incoming.query.get("synchronous", "true").lower() == "false":
            return struct_reply(ModelStatus(f'Model "{name}" registration scheduled.'), 202)
        await asyncio.shield(load)
        return struct_reply(ModelStatus(f'Model "{name}" registered.'))

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run work that continues even if the client that asked for it leaves."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(retrieve_failure)
        return task

    def _source(self, url: str) -> Path:
        allowed = (self._store, self._settings.allowed_model_path)
        path = local_path("url", url, self._store, allowed, "models", "MODEL and allowed_model_path")
        try:
            there = path.exists()
        except OSError as error:  # a directory above it that this user may not enter
            raise InvalidRequest(f"url: {error.strerror}; let user {os.getuid()} read it", param="url") from None
        if not there:
            raise NotFound("url: there is no such directory or archive", param="url")
        if not path.is_dir() and not path.name.endswith(SUFFIXES):
            raise InvalidRequest("url: a directory, or a .tar.gz archive", param="url")
        return path

    async def _add(self, name: str, url: str, source: Path) -> None:
        """Load a model. If this raises, everything of it has been removed."""
        if name in self._models:
            raise Conflict(f'Model "{name}" is loaded already.', param="model_name")
        if len(self._models) >= self._settings.max_models:
            raise InsufficientStorage(
                f"{len(self._models)} models are loaded, which is as many as may be (max_models); unload one"
            )
        if self._closing or self._place is None:
            raise stopping()
        place = Path(tempfile.mkdtemp(dir=self._place))
        socket = os.path.join(self._sockets, place.name)
        model = self._models[name] = Model(name, url, place, socket, self._options, self._settings, self._admit)
        try:
            await model.load(source, self._preparing)
        except BaseException as error:
            if self._models.get(name) is model:
                del self._models[name]
            await model.close()
            if isinstance(error, ServingError):
                logger.error("model %s was not loaded: %s", name, error)
            raise
        logger.info("model %s is loaded", name)

    def _get(self, name: str) -> Model:
        if name not in self._models:  # unloaded since the request began
            raise no_such_model(name)
        return self._models[name]

    async def _unload(self, model: Model) -> None:
        del self._models[model.name]
        await model.close(self._settings.drain_timeout)
        logger.info("model %s is unloaded", model.name)

    def _admit(self, model: Model, needs: Prepared) -> None:
        """Raise InsufficientStorage if a model does not fit beside those that are running."""
        running = [one.taken for one in self._models.values() if one.taken is not None]
        free = self._memory - sum(one.host for one in running)
        if needs.host > free:
            raise _too_large(model.name, needs.host, free, self._memory, "host memory (models_memory_mb)")
        for number, size in needs.devices.items():
            free = needs.device_memory - sum(one.devices.get(number, 0) for one in running)
            if size > free:
                where = f"device {number} (option.gpu_memory_utilization, option.kv_cache_memory_mb)"
                raise _too_large(model.name, size, free, needs.device_memory, where)


def _too_large(name: str, needed: int, free: int, total: int, where: str) -> InsufficientStorage:
    needed_gib, free_gib, total_gib = (size / 2**30 for size in (needed, max(free, 0), total))
    return InsufficientStorage(
        f"model {name!r} needs about {needed_gib:.2f} GiB; {free_gib:.2f} of {total_gib:.2f} GiB are free of the "
        f"{where}: unload a model"
    )


def _name_of(url: str) -> str:
    """Return the name of a model for which the client gives none: the last part of its path, without the suffix."""
    last = url.rstrip("/").rpartition("/")[2]
    for suffix in SUFFIXES:
        last = last.removesuffix(suffix)
    return re.sub(r"[^\w.-]", "_", last, flags=re.ASCII)


async def _in_body(incoming: Incoming) -> str | None:
    """Return the model that the body names; None if it names none."""
    body = incoming.body
    try:
        if len(body) <= SHORT_BYTES:
            return _read_name(body)
        return await asyncio.to_thread(_read_name, body)
    except (msgspec.MsgspecError, ValueError, RecursionError):  # the model's server says what is wrong with it
        return None


def _read_name(body: bytes) -> str | None:
    return msgspec.json.decode(body, type=_Named).model


def _shown(model: Model) -> LoadedModel:
    return LoadedModel(model.name, model.url, model.status)


ROUTES = (
    Route(
        "/models",
        REGISTRY,
        "The loaded models (SageMaker, LMI)",
        methods=READ,
        query={"limit": "How many at most; 100 at most.", "next_page_token": "Of the page before."},
        replies=(LoadedModels,),
        errors=(LmiError,),
        codes=(400,),
    ),
    Route(
        "/models",
        REGISTRY,
        "Load a model, named in the query or in the body; answered when it can be asked (SageMaker, LMI)",
        query={
            "url": "A directory or a .tar.gz archive on this machine; wins over the body.",
            "model_name": "What requests call it; wins over the body.",
        },
        bodies=(LoadBody,),
        replies=(ModelStatus,),
        errors=(LmiError,),
        codes=(400, 404, 408, 409, 413, 415, 507),
    ),
    Route(
        "/models/{name}",
        REGISTRY,
        "One model (SageMaker)",
        methods=READ,
        template="/models/{model}",
        replies=(LoadedModel,),
        errors=(LmiError,),
        codes=(404,),
    ),
    Route(
        "/models/{name}",
        REGISTRY,
        "Unload a model; answered when its requests have ended and its memory is free (SageMaker, LMI)",
        methods=("DELETE",),
        template="/models/{model}",
        replies=(ModelStatus,),
        errors=(LmiError,),
        codes=(404, 408),
    ),
)
