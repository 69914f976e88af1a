"""Models from the Hugging Face hub: only the files that serving needs."""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from handlers.artefacts.error import ArtefactError

logger = logging.getLogger(__name__)

_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_CODE = ("*.py",)
_WEIGHTS = (("*.safetensors",), ("pytorch_model*.bin",))
"""Kinds of weights, best first; only those at the top of the repository, and only the first kind that is there."""


def fetch_hub(
    name: str, revision: str | None, root: Path, *, token: str | None, offline: bool, with_code: bool
) -> Path:
    """The snapshot directory of a repository, in the hub's own cache where that can be written to, else in `root`.

    revision: None is the main branch. with_code: fetch Python files too. Blocks. Raises ArtefactError.
    """
    from huggingface_hub import constants, snapshot_download

    cache = Path(constants.HF_HUB_CACHE)
    offline = offline or constants.HF_HUB_OFFLINE
    if not offline and not _writable(cache):
        cache = root / "hub"
        logger.info("the hub's cache cannot be written to; using %s", cache)
    try:
        files = None if offline else _files(name, revision, token, with_code)
        if files is None:
            return _cached(name, revision, cache, offline)
        patterns = [_literal(file) for file in files]
        return Path(
            snapshot_download(name, revision=revision, cache_dir=cache, token=token, allow_patterns=patterns)
        )
    except ArtefactError:
        raise
    except Exception as error:
        raise ArtefactError(_message(name, revision, cache, error)) from error


def cached_hub(name: str, revision: str | None, root: Path, *, offline: bool) -> Path | None:
    """What `fetch_hub` would serve without asking the hub: offline its result, else what it would bring up to date.

    None where that has to be fetched. Raises ArtefactError as it does.
    """
    from huggingface_hub import constants

    if offline:
        return _cached(name, revision, Path(constants.HF_HUB_CACHE), offline=True)
    places = (Path(constants.HF_HUB_CACHE), root / "hub")
    return next((found for place in places if (found := _snapshot(name, revision, place)) is not None), None)


def _snapshot(name: str, revision: str | None, cache: Path) -> Path | None:
    """One that an earlier run fetched. The hub's own offline look-up wants files that we never fetch."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in ("config.json", "params.json"):
        try:
            found = try_to_load_from_cache(name, file, cache_dir=cache, revision=revision)
        except HFValidationError as error:
            raise ArtefactError(_message(name, revision, cache, error)) from error
        if isinstance(found, str):
            return Path(found).parent
    return None


def _cached(name: str, revision: str | None, cache: Path, offline: bool) -> Path:
    """Raises ArtefactError where there is no snapshot."""
    found = _snapshot(name, revision, cache)
    if found is not None:
        return found
    why = "option.offline or HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
    raise ArtefactError(
        f"{name} is not in {cache} and {why}; check the network, or give a directory or s3://bucket/prefix/"
    )


def _files(name: str, revision: str | None, token: str | None, with_code: bool) -> list[str] | None:
    """What to fetch; None if the hub cannot be reached, so that a copy in the cache can still serve."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        info = HfApi(token=token).model_info(name, revision=revision, files_metadata=True)
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception as error:
        logger.warning(
            "the hub cannot be reached (%s); looking for %s in the cache", type(error).__name__, name
        )
        return None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    files = wanted(list(sizes), with_code)
    gigabytes = sum(sizes[file] for file in files) / 2**30
    logger.info("%s at %s: %d files, %.2f GiB", name, info.sha, len(files), gigabytes)
    return files


def wanted(files: Sequence[str], with_code: bool) -> list[str]:
    """Of a repository's files those that serving needs."""
    small = _SMALL + (_CODE if with_code else ())
    chosen = [file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in small)]
    top = [file for file in files if "/" not in file]
    sharded = any(fnmatch.fnmatch(file, "model*.safetensors") for file in top)
    for kind in _WEIGHTS:
        weights = [file for file in top if any(fnmatch.fnmatch(file, pattern) for pattern in kind)]
        if sharded:
            weights = [file for file in weights if not file.startswith("consolidated")]
        if weights:
            return chosen + weights
    return chosen


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _message(name: str, revision: str | None, cache: Path, error: Exception) -> str:
    """The message for an error of the hub's client: what to do about it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return f"{name!r} is not a hub id: write org/name"
    if isinstance(error, GatedRepoError):
        return (
            f"{name} is gated: accept its terms on its hub page and set HF_TOKEN to a token of that account"
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no model {name} on the hub, or it is private; check the id, or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision!r}; check option.revision"
    if isinstance(error, HfHubHTTPError):
        return f"{name}: the hub answered: {str(error).splitlines()[0]}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{name} cannot be kept in {cache}: {os.strerror(error.errno)}; set HF_HOME"
    return f"{name} cannot be fetched: {type(error).__name__}"


def _writable(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(path, os.W_OK)
