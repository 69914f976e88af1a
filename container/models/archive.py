"""Unpacks a model's .tar.gz into an empty directory, and nothing but plain files and directories."""

from __future__ import annotations

import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from handlers.errors import InsufficientStorage, InvalidRequest

SUFFIXES = (".tar.gz", ".tgz")

_MOST_ENTRIES = 10_000
_MOST_PARTS = 16
_LONGEST_NAME = 1024

_RATIO = 100
_SMALL_BYTES = 64 * 2**20
"""An archive may unpack to this and `_RATIO` times its size. Weights shrink to a half, tokenizers to a fifth."""

_SPARE_BYTES = 256 * 2**20
"""Bytes of the disk that stay free."""

_COPY_BYTES = 2**20
_MOST_READS_AFTER = 16
"""Padding and what else may follow the last entry."""


def unpack(archive: Path, place: Path) -> None:
    """Unpack an archive into an empty directory of ours; if this raises, the caller removes what is there.

    The memory that it takes must be limited from outside: a header may claim any size, and Python's reader believes it.

    Args:
        archive: The file.
        place: The directory.

    Raises:
        InvalidRequest: It is not such an archive, is cut off, or holds what a model does not.
        InsufficientStorage: The disk has no space for it.
    """
    try:
        most = _SMALL_BYTES + _RATIO * archive.stat().st_size
        with tarfile.open(archive, "r:gz") as tar:
            _unpack(tar, place, most)
    except MemoryError:
        raise _refused("one of its headers is too long") from None
    except (tarfile.TarError, zlib.error, EOFError, ValueError, UnicodeError) as error:
        raise _refused(f"it is cut off, or not a gzipped tar: {error}") from error
    except OSError as error:
        if isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
            raise _refused("it holds a path twice") from error
        raise _refused(f"it cannot be unpacked: {error.strerror or error}") from error


def _unpack(tar: tarfile.TarFile, place: Path, most: int) -> None:
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
        if member.size > (free := max(0, shutil.disk_usage(place).free - _SPARE_BYTES)):
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
