"""Fetches models from `s3://bucket/prefix/` with boto3's transfer manager: many ranges at a time, all of one version.

Each URL has its own directory below the download root:

* `files/`: the objects, each under a temporary name until it is complete
* `manifest.json`: size and entity tag of each complete object, so that the next start fetches only what is missing or
  has changed
* `unpacked/`: what an archive contains
* `lock`: locked by the process that fetches
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import queue
import re
import shutil
import tarfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import msgspec

from handlers import progress
from handlers.artefacts import ArtefactError, Cancelled
from handlers.progress import size_text

logger = logging.getLogger(__name__)

PART_BYTES = 32 * 2**20
STREAMS = 16
ATTEMPTS = 6
"""Attempts to fetch each range, and to send each of its requests."""

_READ_BYTES = 2**20
_MAX_UNWRITTEN = 64
"""How many reads may wait for the disk."""

_POLL_SECONDS = 0.2
_ARCHIVES = (".tar.gz", ".tgz")


@dataclass(frozen=True)
class S3Object:
    """An object to fetch. `path` is where it belongs below the model's directory."""

    key: str
    size: int
    etag: str
    path: PurePosixPath


_Ended: TypeAlias = "queue.SimpleQueue[tuple[S3Object, Any]]"
"""Objects whose download has ended, each with its future, which has the error if there is one."""


def fetch_s3(url: str, root: Path, cancelled: threading.Event) -> Path:
    """Return a directory with a copy of everything below `s3://bucket/prefix`, or of what one .tar.gz contains.

    Files that an earlier run fetched are kept if size and entity tag still agree. Credentials, region and endpoint are
    boto3's (environment, container role, ...). Raises ArtefactError, or Cancelled once `cancelled` is set.
    """
    bucket, prefix = parse_url(url)
    place = root / "s3" / hashlib.sha256(url.encode()).hexdigest()[:24]
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _translated(url, bucket), _locked(place, cancelled):
            return _fetch(url, bucket, prefix, place, cancelled)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ArtefactError(f"{url}: no space left in {root}; set SERVING_DOWNLOAD_DIR") from error
        raise ArtefactError(f"{url}: cannot be kept in {root}: {error.strerror or error}") from error


def parse_url(url: str) -> tuple[str, str]:
    """Return bucket and prefix, which is empty for a whole bucket. Raises ArtefactError."""
    match = re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]+)(?:/(.*))?", url)
    if match is None:
        raise ArtefactError(f"{url}: write s3://bucket/prefix/")
    return match[1], match[2] or ""


def require_client() -> None:
    """Raise ArtefactError if boto3 is not installed."""
    if find_spec("boto3") is None:
        raise ArtefactError("models from s3:// need boto3: pip install boto3")


def _fetch(url: str, bucket: str, prefix: str, place: Path, cancelled: threading.Event) -> Path:
    client = _client()
    archive = prefix.endswith(_ARCHIVES)
    objects = [_head(client, bucket, prefix)] if archive else list(_listed(client, bucket, prefix))
    if not objects:
        raise ArtefactError(f"{url}: there is nothing below this prefix; check the name and the region")
    logger.info("%s: %d files", url, len(objects))
    transfer = _Transfer(client, bucket, place, cancelled)
    fetched = transfer.run(objects)
    logger.info("%s: complete, %d files were fetched", url, fetched)
    if not archive:
        return transfer.files
    return _unpack(transfer.files / objects[0].path, place / "unpacked", changed=fetched > 0)


def _client() -> Any:
    require_client()
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "s3",
        config=Config(
            connect_timeout=10,
            read_timeout=30,
            max_pool_connections=STREAMS,
            retries={"mode": "standard", "max_attempts": ATTEMPTS},
        ),
    )


def _head(client: Any, bucket: str, key: str) -> S3Object:
    answer = client.head_object(Bucket=bucket, Key=key)
    return S3Object(key, answer["ContentLength"], answer["ETag"], PurePosixPath(key.rpartition("/")[2]))


def _listed(client: Any, bucket: str, prefix: str) -> Iterator[S3Object]:
    """Yield all objects below the prefix. Raises ArtefactError for a key that is not a safe relative path."""
    if prefix and not prefix.endswith("/"):
        prefix += "/"
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", ()):
            key = entry["Key"]
            relative = key.removeprefix(prefix)
            if not relative or relative.endswith("/"):
                continue
            parts = relative.split("/")
            if any(part in ("", ".", "..") or "\\" in part or not part.isprintable() for part in parts):
                raise ArtefactError(f"the key {key!r} is not the name of a file below the model's directory; rename it")
            yield S3Object(key, entry["Size"], entry["ETag"], PurePosixPath(*parts))


def _unpack(archive: Path, place: Path, changed: bool) -> Path:
    """Unpack an archive, which cannot write outside its directory. Renaming the directory marks it as complete."""
    if place.is_dir() and not changed:
        return place
    draft = place.with_name("unpacking")
    for old in (draft, place):
        shutil.rmtree(old, ignore_errors=True)
    draft.mkdir()
    try:
        with tarfile.open(archive, "r:gz") as tar:
            tar.extractall(draft, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise ArtefactError(f"{archive.name} cannot be unpacked: {error}") from error
    os.replace(draft, place)
    return place


@contextmanager
def _locked(place: Path, cancelled: threading.Event) -> Iterator[None]:
    """Hold the directory's lock. One process fetches at a time; the others wait and find the files complete."""
    with (place / "lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if cancelled.wait(_POLL_SECONDS):
                    raise Cancelled from None
        yield


class _Transfer:
    """Makes `files/` equal to a list of objects. Call `run` once, in a thread that may block."""

    def __init__(self, client: Any, bucket: str, place: Path, cancelled: threading.Event) -> None:
        self.files = place / "files"
        self._client = client
        self._bucket = bucket
        self._manifest = place / "manifest.json"
        self._cancelled = cancelled
        self._ended: _Ended = queue.SimpleQueue()

    def run(self, objects: Sequence[S3Object]) -> int:
        """Fetch what is missing or has changed, remove what is no longer listed, and count the fetched objects.

        Raises ArtefactError, Cancelled, OSError for this machine's disk, and boto3's errors.
        """
        self.files.mkdir(exist_ok=True)
        try:
            known = msgspec.json.decode(self._manifest.read_bytes(), type=dict[str, tuple[int, str]])
        except (OSError, msgspec.MsgspecError):
            known = {}
        missing = [item for item in objects if not self._has(item, known)]
        self._remove_others({str(item.path) for item in objects})
        if missing:
            self._fetch(missing, known)
        return len(missing)

    def _has(self, item: S3Object, known: dict[str, tuple[int, str]]) -> bool:
        path = self.files / item.path
        return (
            known.get(str(item.path)) == (item.size, item.etag) and path.is_file() and path.stat().st_size == item.size
        )

    def _remove_others(self, listed: set[str]) -> None:
        """Remove files that are no longer listed, and those that a killed download left."""
        for path in sorted(self.files.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.files).as_posix() not in listed:
                path.unlink()

    def _fetch(self, items: Sequence[S3Object], known: dict[str, tuple[int, str]]) -> None:
        from s3transfer.manager import TransferConfig, TransferManager

        total = sum(item.size for item in items)
        free = shutil.disk_usage(self.files).free
        if total > free:
            raise ArtefactError(
                f"no space: {size_text(total)} are to be fetched from {self._bucket}, {size_text(free)} are free in "
                f"{self.files.parent}; set SERVING_DOWNLOAD_DIR"
            )
        logger.info("%s: fetching %d files, %s", self._bucket, len(items), size_text(total))
        loading = progress.current()
        loading.begin("", total)
        config = TransferConfig(
            multipart_threshold=1,  # Only requests for ranges name the entity tag that they expect.
            multipart_chunksize=PART_BYTES,
            max_request_concurrency=STREAMS,
            max_io_queue_size=_MAX_UNWRITTEN,
            io_chunksize=_READ_BYTES,
            num_download_attempts=ATTEMPTS,
        )
        with TransferManager(self._client, config) as manager:  # An exception cancels what still runs.
            for item in items:
                target = self.files / item.path
                target.parent.mkdir(parents=True, exist_ok=True)
                download = _Download(item, loading, self._ended)
                manager.download(self._bucket, item.key, str(target), subscribers=[download])
            self._wait(len(items), known)

    def _wait(self, left: int, known: dict[str, tuple[int, str]]) -> None:
        """Register each file that is complete. Raises the error of the first file that failed."""
        from s3transfer.exceptions import RetriesExceededError

        while left:
            if self._cancelled.is_set():
                raise Cancelled
            try:
                item, download = self._ended.get(timeout=_POLL_SECONDS)
                download.result()
                known[str(item.path)] = (item.size, item.etag)
                draft = self._manifest.with_suffix(".new")
                draft.write_bytes(msgspec.json.encode(known))
                os.replace(draft, self._manifest)
                left -= 1
            except queue.Empty:
                pass
            except RetriesExceededError as error:
                raise ArtefactError(
                    f"{self._bucket}: {item.key} cannot be read: {error.last_exception}; files that are complete are "
                    "kept for the next start"
                ) from error


class _Download:
    """Receives what the transfer manager's threads report about one object."""

    _lock = threading.Lock()

    def __init__(self, item: S3Object, loading: progress.Progress, ended: _Ended) -> None:
        self._item = item
        self._loading = loading
        self._ended = ended

    def on_queued(self, future: Any, **_: Any) -> None:
        future.meta.provide_transfer_size(self._item.size)
        future.meta.provide_object_etag(self._item.etag)

    def on_progress(self, future: Any, bytes_transferred: int, **_: Any) -> None:
        with self._lock:
            self._loading.done += bytes_transferred
        if bytes_transferred < 0:  # takes back the bytes of a range
            logger.warning("%s: %s: the connection broke; trying again", future.meta.call_args.bucket, self._item.key)

    def on_done(self, future: Any, **_: Any) -> None:
        self._ended.put((self._item, future))


_CHANGED = "an object changed while it was fetched; start again"
_DENIED = "access is denied; the role needs s3:ListBucket on the bucket and s3:GetObject on its objects ({code})"
_NO_CREDENTIALS = "no AWS credentials were found; give the container a role, or set AWS_ACCESS_KEY_ID and its secret"
_ADVICE = {
    "NoSuchBucket": "there is no bucket {bucket!r}; check the name",
    "404": "there is no such object; check the bucket and the key",
    "NoSuchKey": "an object was deleted while it was fetched; start again",
    **dict.fromkeys(("412", "PreconditionFailed", "S3DownloadFailedError"), _CHANGED),
    **dict.fromkeys(("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"), _DENIED),
    **dict.fromkeys(("NoCredentialsError", "PartialCredentialsError"), _NO_CREDENTIALS),
}
"""Messages by S3's error code, or by the class of an error of boto3's."""


@contextmanager
def _translated(url: str, bucket: str) -> Iterator[None]:
    """Turn boto3's errors into an ArtefactError that says what to do."""
    try:
        yield
    except (ArtefactError, Cancelled, OSError):
        raise
    except Exception as error:
        response: dict[str, Any] = getattr(error, "response", {})
        code = str(response.get("Error", {}).get("Code") or type(error).__name__)
        message = _ADVICE[code].format(bucket=bucket, code=code) if code in _ADVICE else str(error)
        raise ArtefactError(f"{url}: {message}") from error
