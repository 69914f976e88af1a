"""Objects from S3 into files: many ranges at a time, resumable to the range, never of two states.

A file under way is two: `parts/ID.data`, of full size, and `parts/ID.ranges`, the numbers of the ranges that are
in it; ID comes from key, size and entity tag. A complete one is moved to its place and noted in `manifest.json`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from handlers.artefacts.error import ArtefactError

logger = logging.getLogger(__name__)

PART_BYTES = 32 * 2**20
STREAMS = 16
_READ_BYTES = 2**20
_ATTEMPTS = 6
_REPORT_SECONDS = 5.0


class Cancelled(Exception):
    """The download was told to stop."""


@dataclass(frozen=True)
class S3Object:
    """path: where the object belongs below the model's directory."""

    key: str
    size: int
    etag: str
    path: PurePosixPath


@dataclass
class _Partial:
    """One object under way. `done` holds the numbers of the ranges that are on disk."""

    item: S3Object
    data: Path
    journal: Path
    target: Path
    done: set[int]
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def ranges(self) -> int:
        return max(1, -(-self.item.size // PART_BYTES))


class Transfer:
    """Brings a directory to the state of a list of objects. `run` once, in a thread that may block."""

    def __init__(self, client: Any, bucket: str, place: Path, cancelled: threading.Event) -> None:
        """client: boto3's. place: gets `files/`, `parts/` and `manifest.json`; nobody else writes there."""
        self.files = place / "files"
        self._client = client
        self._bucket = bucket
        self._parts = place / "parts"
        self._manifest = place / "manifest.json"
        self._cancelled = cancelled
        self._failed = threading.Event()
        self._lock = threading.Lock()
        self._kept: dict[str, Any] = {}
        self._received = 0

    def run(self, objects: Sequence[S3Object]) -> int:
        """Fetch what is not there, remove what is there no more; how many objects were fetched.

        Raises ArtefactError, Cancelled, OSError for this machine's disk, and boto3's errors.
        """
        self.files.mkdir(exist_ok=True)
        self._parts.mkdir(exist_ok=True)
        self._kept = self._read_manifest()
        missing = [item for item in objects if not self._is_there(item)]
        self._remove_others({str(item.path) for item in objects})
        if missing:
            self._fetch([self._begin(item) for item in missing])
        shutil.rmtree(self._parts)
        return len(missing)

    def _is_there(self, item: S3Object) -> bool:
        path, known = self.files / item.path, self._kept.get(str(item.path))
        return known == [item.size, item.etag] and path.is_file() and path.stat().st_size == item.size

    def _begin(self, item: S3Object) -> _Partial:
        name = hashlib.sha256(f"{item.key}\0{item.etag}\0{item.size}\0{PART_BYTES}".encode()).hexdigest()[:32]
        data, journal = self._parts / f"{name}.data", self._parts / f"{name}.ranges"
        done: set[int] = set()
        if data.is_file() and journal.is_file() and data.stat().st_size == item.size:
            done = {int(line) for line in journal.read_text().split("\n")[:-1]}
        else:
            journal.unlink(missing_ok=True)
            with data.open("wb") as file:
                file.truncate(item.size)
        return _Partial(item, data, journal, self.files / item.path, done)

    def _fetch(self, partials: Sequence[_Partial]) -> None:
        work = [
            (each, number) for each in partials for number in range(each.ranges) if number not in each.done
        ]
        left = sum(_span(each.item, number)[1] for each, number in work)
        total = sum(each.item.size for each in partials)
        free = shutil.disk_usage(self._parts).free
        if left > free:
            raise ArtefactError(
                f"no space: {_size(left)} are to be fetched from {self._bucket}, {_size(free)} are free in "
                f"{self._parts.parent}; set SERVING_DOWNLOAD_DIR"
            )
        logger.info(
            "%s: fetching %d files, %s, %s of it here already", self._bucket, len(partials), _size(total),
            _size(total - left),
        )  # fmt: skip
        finished = [each for each in partials if len(each.done) == each.ranges]
        for each in finished:
            self._finish(each)
        began = time.monotonic()
        with ThreadPoolExecutor(STREAMS, "s3") as pool:
            running = {pool.submit(self._fetch_range, each, number) for each, number in work}
            waiting = running
            while waiting:
                _, waiting = wait(waiting, timeout=_REPORT_SECONDS)
                if waiting:
                    speed = self._received / (time.monotonic() - began)
                    here = total - left + self._received
                    logger.info("%s: %s of %s, %s/s", self._bucket, _size(here), _size(total), _size(speed))
        errors = [error for task in running if (error := task.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, Cancelled)):
            raise error

    def _fetch_range(self, partial: _Partial, number: int) -> None:
        if self._failed.is_set():
            return
        try:
            if self._cancelled.is_set():
                raise Cancelled
            self._receive(partial, number)
            with partial.lock:
                partial.done.add(number)
                with partial.journal.open("a") as journal:
                    journal.write(f"{number}\n")
                complete = len(partial.done) == partial.ranges
            if complete:
                self._finish(partial)
        except BaseException:
            self._failed.set()
            raise

    def _receive(self, partial: _Partial, number: int) -> None:
        """One range into its place. A connection that breaks is continued where it broke."""
        item = partial.item
        start, length = _span(item, number)
        got = failures = 0
        with partial.data.open("r+b") as file:
            while got < length:
                before = got
                problem: Exception = ConnectionError("the connection ended early")
                try:
                    for chunk in self._stream(item, start + got, start + length - 1):
                        file.seek(start + got)
                        file.write(chunk)
                        got += len(chunk)
                        with self._lock:
                            self._received += len(chunk)
                except Exception as error:
                    if not _transient(error):
                        raise
                    problem = error
                if got < length:
                    failures = 1 if got > before else failures + 1
                    self._pause(item, failures, problem)

    def _stream(self, item: S3Object, first: int, last: int) -> Iterator[bytes]:
        answer = self._client.get_object(
            Bucket=self._bucket, Key=item.key, IfMatch=item.etag, Range=f"bytes={first}-{last}"
        )
        body, left = answer["Body"], last - first + 1
        try:
            while left > 0 and (chunk := body.read(min(_READ_BYTES, left))):
                if self._cancelled.is_set() or self._failed.is_set():
                    raise Cancelled
                left -= len(chunk)
                yield chunk
        finally:
            body.close()

    def _pause(self, item: S3Object, failures: int, problem: Exception) -> None:
        if failures >= _ATTEMPTS:
            raise ArtefactError(
                f"{self._bucket}: {item.key} cannot be read: {problem}; what is here is kept for the next start"
            ) from problem
        logger.warning("%s: %s: %s; trying again", self._bucket, item.key, problem)
        if self._cancelled.wait(min(8.0, 0.1 * 2**failures)):
            raise Cancelled

    def _finish(self, partial: _Partial) -> None:
        partial.target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial.data, partial.target)
        partial.journal.unlink(missing_ok=True)
        with self._lock:
            self._kept[str(partial.item.path)] = [partial.item.size, partial.item.etag]
            draft = self._manifest.with_suffix(".new")
            draft.write_text(json.dumps(self._kept))
            os.replace(draft, self._manifest)

    def _read_manifest(self) -> dict[str, Any]:
        try:
            known = json.loads(self._manifest.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _remove_others(self, wanted: set[str]) -> None:
        """Files of an earlier state of the prefix that are there no more."""
        for path in sorted(self.files.rglob("*"), reverse=True):
            name = path.relative_to(self.files).as_posix()
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif name not in wanted:
                path.unlink()


def _span(item: S3Object, number: int) -> tuple[int, int]:
    """Offset and length of a range."""
    start = number * PART_BYTES
    return start, min(PART_BYTES, item.size - start)


def _transient(error: Exception) -> bool:
    """Whether asking again may help: a broken connection, a slow or busy server."""
    if isinstance(error, OSError):
        return isinstance(error, ConnectionError | TimeoutError)
    status = getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
    if status is not None:
        return bool(status >= 500 or status == 429)
    from botocore.exceptions import HTTPClientError, IncompleteReadError
    from urllib3.exceptions import HTTPError

    return isinstance(error, HTTPClientError | IncompleteReadError | HTTPError)


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
