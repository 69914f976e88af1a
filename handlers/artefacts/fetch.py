"""Finds the directory of a model, which may be a directory already, a repository of the hub, or an S3 prefix."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

from handlers.artefacts import ArtefactError
from handlers.artefacts.mistral import completed, lacks_hub_files
from properties.model import ModelLocation
from properties.settings import Settings


def fetch(location: ModelLocation, settings: Settings, cancelled: threading.Event) -> Path:
    """Return the model's directory, after downloading what is missing. Blocks: call it in a thread.

    For a model in Mistral's own format, the directory also contains what the model lacks of the Hugging Face format.
    cancelled: set it to stop the download soon. Raises ArtefactError.
    """
    if location.kind == "directory":
        return _completed(Path(location.value), settings)
    root = download_root(settings.download_dir)
    if location.kind == "s3":
        from handlers.artefacts.s3 import fetch_s3

        return _completed(fetch_s3(location.value, root, cancelled), settings)
    from handlers.artefacts.hub import fetch_hub

    directory = fetch_hub(
        location.value,
        location.revision,
        root,
        token=None if settings.hf_token is None else settings.hf_token.get_secret_value(),
        offline=settings.offline,
        with_code=settings.trust_remote_code,
    )
    return _completed(directory, settings)


def here(location: ModelLocation, settings: Settings) -> tuple[Path | None, bool]:
    """Return what `fetch` would return without a download, and whether it is final; (None, False) before the first one.

    Raises ArtefactError if it is certain that `fetch` will.
    """
    if location.kind == "directory":
        return _completed(Path(location.value), settings), True
    if location.kind == "s3":
        from handlers.artefacts.s3 import parse_url, require_client

        parse_url(location.value)
        require_client()
        return None, False
    from handlers.artefacts.hub import cached_hub

    root = download_root(settings.download_dir)
    found = cached_hub(location.value, location.revision, root, offline=settings.offline)
    return (None if found is None else _completed(found, settings)), settings.offline


def download_root(configured: str | None) -> Path:
    """Return the directory for downloads, which is created if it is missing. Raises ArtefactError."""
    root = Path(configured) if configured else Path(tempfile.gettempdir()) / f"lmi-models-{os.getuid()}"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = root.stat().st_uid
    except OSError as error:
        raise ArtefactError(
            f"downloads cannot be kept in {root}: {error.strerror}; set SERVING_DOWNLOAD_DIR"
        ) from error
    if configured is None and owner != os.getuid():
        raise ArtefactError(f"{root} belongs to another user; set SERVING_DOWNLOAD_DIR")
    return root


def _completed(directory: Path, settings: Settings) -> Path:
    if not lacks_hub_files(directory):
        return directory
    try:
        return completed(directory, download_root(settings.download_dir))
    except ArtefactError:
        if (directory / "model.py").is_file():  # It may read formats that this server does not.
            return directory
        raise
