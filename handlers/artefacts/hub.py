"""Fetches models from the Hugging Face hub: only the files that serving needs."""

from __future__ import annotations

import fnmatch
import glob
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm.auto import tqdm

from handlers import progress
from handlers.artefacts import ArtefactError
from handlers.progress import size_text

logger = logging.getLogger(__name__)

_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""Formats of weights. Only the first that a repository has in its top directory is fetched."""


def fetch_hub(
    name: str, revision: str | None, root: Path, *, token: str | None, offline: bool, with_code: bool
) -> Path:
    """Return the directory of a repository's snapshot, after fetching what is missing. Blocks.

    The directory is in the hub's own cache if that is writable, else below `root`. revision: None is the main branch.
    with_code: also fetch Python files. Raises ArtefactError.
    """
    cache = Path(constants.HF_HUB_CACHE)
    offline = offline or constants.HF_HUB_OFFLINE
    if not offline and not _writable(cache):
        cache = root / "hub"
        logger.info("the hub's cache cannot be written to; using %s", cache)
    try:
        files = None if offline else _files(name, revision, token, with_code, cache)
        if files is None:
            return _cached(name, revision, cache, offline)
        patterns = [glob.escape(file) for file in files]
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache,
                token=token,
                allow_patterns=patterns,
                tqdm_class=_bar(progress.current()),
            )
        )
    except ArtefactError:
        raise
    except Exception as error:
        raise ArtefactError(_message(name, revision, cache, error)) from error


def cached_hub(name: str, revision: str | None, root: Path, *, offline: bool) -> Path | None:
    """Return the snapshot that an earlier `fetch_hub` left, or None. Offline, raises ArtefactError if there is none."""
    cache = Path(constants.HF_HUB_CACHE)
    if offline:
        return _cached(name, revision, cache, offline=True)
    return _snapshot(name, revision, cache) or _snapshot(name, revision, root / "hub")


def wanted(files: Sequence[str], with_code: bool) -> list[str]:
    """Return the files of a repository that serving needs."""
    patterns = (*_SMALL, "*.py") if with_code else _SMALL
    small = [file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in patterns)]
    top = [file for file in files if "/" not in file]
    if fnmatch.filter(top, "model*.safetensors"):  # The others are the same weights in Mistral's own format.
        top = [file for file in top if not file.startswith("consolidated")]
    return small + next((found for kind in _WEIGHTS if (found := fnmatch.filter(top, kind))), [])


def _files(name: str, revision: str | None, token: str | None, with_code: bool, cache: Path) -> list[str] | None:
    """Return the files to fetch, or None if the hub cannot be reached: a copy in the cache may still serve."""
    try:
        info = HfApi(token=token).model_info(name, revision=revision, files_metadata=True)
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception as error:
        logger.warning("the hub cannot be reached (%s); looking for %s in the cache", type(error).__name__, name)
        return None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    files = wanted(list(sizes), with_code)
    logger.info("%s at %s: %d files, %s", name, info.sha, len(files), size_text(sum(sizes[file] for file in files)))
    missing = [
        file
        for file in files
        if not isinstance(try_to_load_from_cache(name, file, cache_dir=cache, revision=info.sha), str)
    ]
    progress.current().begin("", sum(sizes[file] for file in missing))
    return files


def _bar(loading: progress.Progress) -> type:
    """Return a class of progress bars that show nothing and report to `loading`.

    The hub's client makes a bar for the bytes that it receives and one for the bytes that it has written, and uses one
    or both of them, depending on how a file is stored.
    """

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts = options.get("unit") == "B"
            self._count = 0
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts:
                self._count += int(n or 0)
                loading.done = max(loading.done, self._count)
            return None

    return Bar


def _cached(name: str, revision: str | None, cache: Path, offline: bool) -> Path:
    found = _snapshot(name, revision, cache)
    if found is not None:
        return found
    why = "option.offline or HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
    raise ArtefactError(
        f"{name} is not in {cache} and {why}; check the network, or give a directory or s3://bucket/prefix/"
    )


def _snapshot(name: str, revision: str | None, cache: Path) -> Path | None:
    """Look up a snapshot in the cache. `snapshot_download` would miss the files that are never fetched."""
    for file in ("config.json", "params.json"):
        try:
            found = try_to_load_from_cache(name, file, cache_dir=cache, revision=revision)
        except HFValidationError as error:
            raise ArtefactError(_message(name, revision, cache, error)) from error
        if isinstance(found, str):
            return Path(found).parent
    return None


def _message(name: str, revision: str | None, cache: Path, error: Exception) -> str:
    """Say what is wrong and what to do about it."""
    match error:
        case HFValidationError():
            return f"{name!r} is not a hub id: write org/name"
        case GatedRepoError():
            return f"{name} is gated: accept its terms on its hub page and set HF_TOKEN to a token of that account"
        case RepositoryNotFoundError():
            return f"there is no model {name} on the hub, or it is private; check the id, or set HF_TOKEN"
        case RevisionNotFoundError():
            return f"{name} has no revision {revision!r}; check option.revision"
        case HfHubHTTPError():
            return f"{name}: the hub answered: {str(error).splitlines()[0]}"
        case OSError(errno=int(number)):
            return f"{name} cannot be kept in {cache}: {os.strerror(number)}; set HF_HOME"
    return f"{name} cannot be fetched: {type(error).__name__}"


def _writable(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(path, os.W_OK)
