"""The process that makes a model ready to be loaded, and ends: it unpacks, fetches and measures it.

What an archive's headers make Python's reader take, and the libraries that the estimate needs, stay out of the server.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec

from container.models.archive import unpack
from container.models.messages import Answer, Failure, Prepare, Prepared
from handlers.errors import ServingError
from processes.inside import Parent
from properties.configuration import Configuration
from properties.model import holds_model
from properties.problem import ConfigurationError, Problem

_UNPACKING_BYTES = 256 * 2**20
"""Memory of the process while it unpacks an archive."""

_PROCESSES_BYTES = 640 * 2**20
"""Host memory of a model's processes beside weights and caches: its server, its engine and two image decoders."""

_ENGINE_BYTES = 400 * 2**20
"""Of it, an engine's process, of which there is one for each replica and rank."""

_ENCODER_MB = 32
"""The encoder's cache on a CPU where no option says."""

_OWN_CODE_FACTOR = 1.2
"""What a model's own code is taken to need for each byte of its files: LMI's number."""


def main() -> None:
    """Answer the parent's one question."""
    parent = Parent()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    question = parent.receive()
    if question is not None:
        parent.send(msgspec.json.encode(_answer(msgspec.json.decode(question, type=Prepare))))


def _answer(order: Prepare) -> Answer:
    try:
        return _prepared(order)
    except ConfigurationError as error:
        return Failure("the model cannot be served: " + "; ".join(map(str, error.problems)), 400)
    except ServingError as error:
        return Failure(error.message, error.status)


def _prepared(order: Prepare) -> Prepared:
    directory = Path(order.source)
    if not directory.is_dir():
        with _limited():
            unpack(directory, Path(order.place))
        directory = _root(Path(order.place))
    return _measured(directory, order.options)


@contextmanager
def _limited() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_UNPACKING_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _root(place: Path) -> Path:
    """The model's directory in an unpacked archive, which may hold it as its only entry."""
    entries = list(place.iterdir())
    if len(entries) == 1 and entries[0].is_dir() and not holds_model(place):
        return entries[0]
    return place


def _measured(directory: Path, options: list[str]) -> Prepared:
    """Fetch what the model's serving.properties names, and estimate with the arithmetic of `lmi check`."""
    from container.config import configured, unreadable
    from handlers.artefacts import ArtefactError
    from handlers.artefacts.fetch import fetch

    try:
        configuration = configured(str(directory), options, os.environ, {})
        files = fetch(configuration.model_location, configuration.settings, threading.Event())
        configuration = configuration.with_model_directory(files)
        return _estimated(replace(configuration, home=configuration.home or files), directory, files)
    except ArtefactError as error:
        raise ConfigurationError([Problem(str(error), "model_id")]) from error
    except OSError as error:
        raise ConfigurationError([unreadable(error)]) from error


def _estimated(configuration: Configuration, directory: Path, files: Path) -> Prepared:
    from engine.machine import this_machine
    from engine.memory import CUDA_RESERVE
    from handlers.backends.fit import fit
    from handlers.backends.select import backend_of, choose_for
    from handlers.custom.find import find_handler
    from properties.configuration import read_model_config

    settings = configuration.settings
    if find_handler(configuration, files) is not None:
        return Prepared(str(directory), _PROCESSES_BYTES + int(_size(files) * _OWN_CODE_FACTOR))
    machine = this_machine()
    config = read_model_config(files) or {}
    choice = choose_for(configuration, config, len(machine.accelerators))
    found = fit(configuration, backend_of(choice.backend), files, config, machine)
    weights, cache = found.weights or _size(files), found.cache_per_device or 0
    ranks = found.replicas * found.devices_per_replica
    host = _PROCESSES_BYTES + (ranks - 1) * _ENGINE_BYTES + settings.image_cache_mb * 3 * 2**19
    if machine.accelerators:
        wanted = settings.load_on_devices
        numbers = range(len(machine.accelerators)) if wanted == "*" else wanted
        each = -(-weights // found.devices_per_replica) + cache + CUDA_RESERVE
        return Prepared(str(directory), host, dict.fromkeys(numbers[:ranks], each), found.device.memory)
    encoder = settings.encoder_cache_mb if settings.encoder_cache_mb is not None else _ENCODER_MB
    return Prepared(str(directory), host + weights * found.replicas + (cache + encoder * 2**20) * ranks)


def _size(files: Path) -> int:
    return sum(path.stat().st_size for path in files.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
