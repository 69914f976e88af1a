"""Models from `s3://bucket/prefix/`: which objects belong to one, and errors that say what to do.

Layout below the download root, one directory per URL: `files/` (see `handlers.artefacts.transfer`), `unpacked/` for an
archive, `lock`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from handlers.artefacts.error import ArtefactError
from handlers.artefacts.transfer import ATTEMPTS, STREAMS, Cancelled, S3Object, Transfer

logger = logging.getLogger(__name__)

_ARCHIVES = (".tar.gz", ".tgz")


def fetch_s3(url: str, root: Path, cancelled: threading.Event) -> Path:
    """The directory that holds a copy of everything below `s3://bucket/prefix`, or of one .tar.gz unpacked.

    What an earlier run fetched is kept where size and entity tag still agree. Credentials, region and endpoint
    are boto3's (environment, container role, ...). Raises ArtefactError, or Cancelled once `cancelled` is set.
    """
    bucket, prefix = parse_url(url)
    place = root / "s3" / hashlib.sha256(url.encode()).hexdigest()[:24]
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _translated(url), _alone(place, cancelled):
            return _fetch(url, bucket, prefix, place, cancelled)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ArtefactError(f"{url}: no space left in {root}; set SERVING_DOWNLOAD_DIR") from error
        raise ArtefactError(f"{url}: cannot be kept in {root}: {error.strerror or error}") from error


def parse_url(url: str) -> tuple[str, str]:
    """Bucket and prefix, which is empty for a whole bucket. Raises ArtefactError."""
    match = re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]+)(?:/(.*))?", url)
    if match is None:
        raise ArtefactError(f"{url}: write s3://bucket/prefix/")
    return match[1], match[2] or ""


def _fetch(url: str, bucket: str, prefix: str, place: Path, cancelled: threading.Event) -> Path:
    client = _client()
    transfer = Transfer(client, bucket, place, cancelled)
    archive = prefix.endswith(_ARCHIVES)
    objects = [_head(client, bucket, prefix)] if archive else list(_listed(client, bucket, prefix))
    if not objects:
        raise ArtefactError(f"{url}: there is nothing below this prefix; check the name and the region")
    logger.info("%s: %d files", url, len(objects))
    fetched = transfer.run(objects)
    logger.info("%s: complete, %d files were fetched", url, fetched)
    if not archive:
        return transfer.files
    return _unpack(transfer.files / objects[0].path, place / "unpacked", changed=fetched > 0)


def _head(client: Any, bucket: str, key: str) -> S3Object:
    answer = client.head_object(Bucket=bucket, Key=key)
    return S3Object(key, answer["ContentLength"], answer["ETag"], PurePosixPath(key.rpartition("/")[2]))


def _listed(client: Any, bucket: str, prefix: str) -> Iterator[S3Object]:
    """All objects below the prefix. Raises ArtefactError for a key that is not a harmless relative path."""
    if prefix and not prefix.endswith("/"):
        prefix += "/"
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", ()):
            relative = entry["Key"].removeprefix(prefix)
            if relative and not relative.endswith("/"):
                path = _safe_path(entry["Key"], relative)
                yield S3Object(entry["Key"], entry["Size"], entry["ETag"], path)


def _unpack(archive: Path, place: Path, changed: bool) -> Path:
    """Unpack an archive, which cannot write outside its directory. The last rename marks it as complete."""
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


def _safe_path(key: str, relative: str) -> PurePosixPath:
    parts = relative.split("/")
    if any(part in ("", ".", "..") or "\\" in part or not part.isprintable() for part in parts):
        raise ArtefactError(
            f"the key {key!r} is not the name of a file below the model's directory; rename it"
        )
    return PurePosixPath(*parts)


@contextmanager
def _alone(place: Path, cancelled: threading.Event) -> Iterator[None]:
    """Hold the directory's lock. One process fetches at a time; the others wait and find the files complete."""
    with (place / "lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if cancelled.wait(0.2):
                    raise Cancelled from None
        yield


def require_client() -> None:
    """Raises ArtefactError if boto3 is not installed."""
    if find_spec("boto3") is None:
        raise ArtefactError("models from s3:// need boto3: pip install boto3")


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


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turn boto3's errors into an ArtefactError that says what to do."""
    bucket = url.removeprefix("s3://").partition("/")[0]
    try:
        yield
    except (ArtefactError, Cancelled, OSError):
        raise
    except Exception as error:
        code = _code(error)
        changed = "an object changed while it was fetched; start again"
        known = {
            "NoSuchBucket": f"there is no bucket {bucket!r}; check the name",
            "404": "there is no such object; check the bucket and the key",
            "NoSuchKey": "an object went away while it was fetched; start again",
            "412": changed,
            "PreconditionFailed": changed,
        }
        denied = (
            "access is denied; the role needs s3:ListBucket on the bucket and s3:GetObject on its objects"
        )
        no_one = (
            "no AWS credentials were found; give the container a role or set AWS_ACCESS_KEY_ID and its like"
        )
        if code in known:
            message = known[code]
        elif code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
            message = f"{denied} ({code})"
        elif type(error).__name__ == "S3DownloadFailedError":  # by its entity tag
            message = changed
        elif type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            message = no_one
        else:
            message = f"{error}"
        raise ArtefactError(f"{url}: {message}") from error


def _code(error: Exception) -> str:
    response: dict[str, Any] = getattr(error, "response", {})
    return str(response.get("Error", {}).get("Code", ""))
