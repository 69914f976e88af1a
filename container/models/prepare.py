"""The process that prepares a model and ends: it unpacks, fetches and measures it.

Unpacking hostile archives, and the libraries that the estimate needs, take memory that the server must not lose.
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
import sys
import tarfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

import msgspec

from container.models.messages import Answer, Failure, Prepare, Prepared
from handlers.errors import InsufficientStorage, InvalidRequest, ServingError
from processes.inside import Parent
from properties.configuration import Configuration
from properties.model import holds_model
from properties.problem import ConfigurationError, Problem

SUFFIXES = (".tar.gz", ".tgz")

_MOST_ENTRIES = 10_000
_MOST_PARTS = 16
_LONGEST_NAME = 1024

_RATIO = 100
_SMALL_BYTES = 64 * 2**20
"""An archive may unpack to this and `_RATIO` times its size. Weights shrink to a half, tokenizers to a fifth."""

SPARE_BYTES = 256 * 2**20

_COPY_BYTES = 2**20
_MOST_READS_AFTER = 16
"""The most reads of padding and of anything else that follows the last entry."""

_UNPACKING_BYTES = 256 * 2**20
"""Memory of the process while it unpacks an archive."""

_PROCESSES_BYTES = 640 * 2**20
"""Host memory of a model's processes without weights and caches: its server, its engine and two image decoders."""

_ENGINE_BYTES = 400 * 2**20
"""The part of `_PROCESSES_BYTES` for an engine's process; each replica and rank has one."""

_ENCODER_MB = 32
"""The size of the encoder's cache on a CPU if no option sets it."""

_OWN_CODE_FACTOR = 1.2
"""Bytes that a model's own code is assumed to need for each byte of its files: LMI's number."""


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
        return Failure.of_configuration(error)
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


def unpack(archive: Path, place: Path, spare_bytes: int = SPARE_BYTES) -> None:
    """Unpack an archive into an empty directory of ours; if this raises, the caller removes what is there.

    The memory that it takes must be limited from outside: a header may claim any size, and Python's reader believes it.

    Args:
        archive: The file.
        place: The directory.
        spare_bytes: Bytes of the disk that stay free.

    Raises:
        InvalidRequest: It is not such an archive, is cut off, or holds what a model does not.
        InsufficientStorage: The disk has no space for it.
    """
    try:
        most = _SMALL_BYTES + _RATIO * archive.stat().st_size
        with tarfile.open(archive, "r:gz") as tar:
            _unpack(tar, place, most, spare_bytes)
    except MemoryError:
        raise _refused("one of its headers is too long") from None
    except (tarfile.TarError, zlib.error, EOFError, ValueError, UnicodeError) as error:
        raise _refused(f"it is cut off, or not a gzipped tar: {error}") from error
    except OSError as error:
        if isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
            raise _refused("it holds a path twice") from error
        raise _refused(f"it cannot be unpacked: {error.strerror or error}") from error


def _unpack(tar: tarfile.TarFile, place: Path, most: int, spare_bytes: int) -> None:
    total = 0
    for count, member in enumerate(tar, 1):
        if count > _MOST_ENTRIES:
            raise _refused(f"it holds more than {_MOST_ENTRIES} entries")
        path = _path(member.name)
        if member.isdir():
            (place / path).mkdir(parents=True, exist_ok=True)
            continue
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
            raise _refused(f"{_shown(member.name)} is neither a plain file nor a directory")
        total += member.size
        if total > most:
            raise _refused(f"it unpacks to more than {most / 2**20:.0f} MiB, which its size does not explain")
        if member.size > (free := max(0, shutil.disk_usage(place).free - spare_bytes)):
            raise InsufficientStorage(
                f"url: {_shown(member.name)} has {member.size / 2**30:.2f} GiB; {free / 2**30:.2f} GiB of the disk are "
                "left for models: unload one, or set SERVING_DOWNLOAD_DIR"
            )
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        source = tar.extractfile(member)
        assert source is not None
        with source, open(place / path, "xb") as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)
        if (place / path).stat().st_size != member.size:
            raise _refused(f"{_shown(member.name)} is cut off")
    assert tar.fileobj is not None
    for _ in range(_MOST_READS_AFTER):
        if not tar.fileobj.read(_COPY_BYTES):  # The last read checks the sum of all that came before it.
            break


def _path(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or "\\" in name:
        raise _refused(f"{_shown(name)} leads out of it")
    if len(path.parts) > _MOST_PARTS or len(name) > _LONGEST_NAME:
        raise _refused(f"{_shown(name)} is too long a path")
    return path


def _shown(name: str) -> str:
    return repr(name[:80])


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(f"url: the archive is refused: {why}", param="url")


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
        configuration = configured(str(directory), options, os.environ, {}).with_default("min_workers", 1)
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
