"""Objects from S3 into a directory, by boto3's transfer manager: many ranges at a time, never of two states.

`files/` receives the objects, each under a temporary name until it is complete. `manifest.json` notes the size and
entity tag of each complete one, so that the next start fetches only what is missing or has changed.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from handlers.artefacts.error import ArtefactError

logger = logging.getLogger(__name__)

PART_BYTES = 32 * 2**20
STREAMS = 16
ATTEMPTS = 6
"""Attempts for each range, and for each of its requests."""

_READ_BYTES = 2**20
_MOST_UNWRITTEN = 64
"""The most reads that may wait for the disk."""

_LOOK_SECONDS = 0.2
_REPORT_SECONDS = 5.0


class Cancelled(Exception):
    """The download was cancelled."""


@dataclass(frozen=True)
class S3Object:
    """path: where the object belongs below the model's directory."""

    key: str
    size: int
    etag: str
    path: PurePosixPath


class Transfer:
    """Brings a directory to the state of a list of objects. Call `run` once, in a thread that may block."""

    def __init__(self, client: Any, bucket: str, place: Path, cancelled: threading.Event) -> None:
        """client: boto3's. place: receives `files/` and `manifest.json`; nobody else writes there."""
        self.files = place / "files"
        self._client = client
        self._bucket = bucket
        self._manifest = place / "manifest.json"
        self._cancelled = cancelled
        self._ended: queue.SimpleQueue[tuple[S3Object, Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._received = 0

    def run(self, objects: Sequence[S3Object]) -> int:
        """Fetch what is missing or has changed, remove what is no longer listed, and count the fetched objects.

        Raises ArtefactError, Cancelled, OSError for this machine's disk, and boto3's errors.
        """
        self.files.mkdir(exist_ok=True)
        kept = self._read_manifest()
        missing = [item for item in objects if not self._is_there(item, kept)]
        self._remove_others({str(item.path) for item in objects})
        if missing:
            self._fetch(missing, kept)
        return len(missing)

    def _is_there(self, item: S3Object, kept: dict[str, Any]) -> bool:
        path, known = self.files / item.path, kept.get(str(item.path))
        return known == [item.size, item.etag] and path.is_file() and path.stat().st_size == item.size

    def _fetch(self, items: Sequence[S3Object], kept: dict[str, Any]) -> None:
        from s3transfer.manager import TransferConfig, TransferManager

        total = sum(item.size for item in items)
        free = shutil.disk_usage(self.files).free
        if total > free:
            raise ArtefactError(
                f"no space: {_size(total)} are to be fetched from {self._bucket}, {_size(free)} are free in "
                f"{self.files.parent}; set SERVING_DOWNLOAD_DIR"
            )
        logger.info("%s: fetching %d files, %s", self._bucket, len(items), _size(total))
        config = TransferConfig(
            multipart_threshold=1,  # Only requests for ranges name the entity tag that they expect.
            multipart_chunksize=PART_BYTES,
            max_request_concurrency=STREAMS,
            max_io_queue_size=_MOST_UNWRITTEN,
            io_chunksize=_READ_BYTES,
            num_download_attempts=ATTEMPTS,
        )
        with TransferManager(self._client, config) as manager:  # An exception cancels what still runs.
            for item in items:
                target = self.files / item.path
                target.parent.mkdir(parents=True, exist_ok=True)
                manager.download(self._bucket, item.key, str(target), subscribers=[_Download(self, item)])
            self._await(len(items), total, kept)

    def _await(self, left: int, total: int, kept: dict[str, Any]) -> None:
        """Register each file that is complete, and report progress. Raises the error of the first file that failed."""
        from s3transfer.exceptions import RetriesExceededError

        began = reported = time.monotonic()
        while left:
            if self._cancelled.is_set():
                raise Cancelled
            try:
                item, download = self._ended.get(timeout=_LOOK_SECONDS)
                download.result()
                kept[str(item.path)] = [item.size, item.etag]
                self._write_manifest(kept)
                left -= 1
            except queue.Empty:
                pass
            except RetriesExceededError as error:
                raise ArtefactError(
                    f"{self._bucket}: {item.key} cannot be read: {error.last_exception}; files that are complete are "
                    "kept for the next start"
                ) from error
            now = time.monotonic()
            if left and now - reported >= _REPORT_SECONDS:
                reported = now
                speed = _size(self._received / (now - began))
                logger.info("%s: %s of %s, %s/s", self._bucket, _size(self._received), _size(total), speed)

    def advance(self, item: S3Object, count: int) -> None:
        """Count bytes received; a negative count takes back those of a range that broke off."""
        with self._lock:
            self._received += count
        if count < 0:
            logger.warning("%s: %s: the connection broke; trying again", self._bucket, item.key)

    def end(self, item: S3Object, download: Any) -> None:
        """Register a download that succeeded, failed or was cancelled."""
        self._ended.put((item, download))

    def _read_manifest(self) -> dict[str, Any]:
        try:
            known = json.loads(self._manifest.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _write_manifest(self, kept: dict[str, Any]) -> None:
        draft = self._manifest.with_suffix(".new")
        draft.write_text(json.dumps(kept))
        os.replace(draft, self._manifest)

    def _remove_others(self, wanted: set[str]) -> None:
        """Files of an earlier state of the prefix, and of downloads that were killed."""
        for path in sorted(self.files.rglob("*"), reverse=True):
            name = path.relative_to(self.files).as_posix()
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif name not in wanted:
                path.unlink()


class _Download:
    """Receives what the transfer manager reports about one object, from its threads."""

    def __init__(self, transfer: Transfer, item: S3Object) -> None:
        self._transfer = transfer
        self._item = item

    def on_queued(self, future: Any, **_: Any) -> None:
        future.meta.provide_transfer_size(self._item.size)
        future.meta.provide_object_etag(self._item.etag)

    def on_progress(self, future: Any, bytes_transferred: int, **_: Any) -> None:
        self._transfer.advance(self._item, bytes_transferred)

    def on_done(self, future: Any, **_: Any) -> None:
        self._transfer.end(self._item, future)


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
