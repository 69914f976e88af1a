"""Models in Mistral's own format, as Pixtral-12B-2409 is published: `params.json`, `tekken.json`, `consolidated*`.

The files of the Hugging Face format that such a model lacks are written from its own into a directory that also links
to all that the model has; everything else in this server reads that directory. The weights are not copied: the
embedded engine converts them while it loads them (`engine.weights`), and vLLM reads them itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from handlers.artefacts.error import ArtefactError
from handlers.artefacts.mistral_config import Params, config_of, processor_files, read_params
from handlers.artefacts.mistral_template import chat_template
from handlers.artefacts.tekken import Tekken, read_tekken, tokenizer_files

logger = logging.getLogger(__name__)

PARAMS, TEKKEN = "params.json", "tekken.json"
_FORMAT = b"1"
"""Of what is written here; what another version of this server wrote is not used."""


def lacks_hub_files(directory: Path) -> bool:
    """Whether a model has to be completed before it can be served."""
    return _lacks(directory, PARAMS, "config.json") or _lacks(directory, TEKKEN, "tokenizer.json")


def completed(directory: Path, root: Path) -> Path:
    """A directory below `root` with all that the model has, and what it lacks of the Hugging Face format.

    One that an earlier start made is used where the model has not changed since. Raises ArtefactError, naming the field
    of params.json or tekken.json, for a model that is not served.
    """
    place = root / "mistral" / _key(directory)
    if place.is_dir():
        return place
    made = _files(directory)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=place.parent))
        try:
            for entry in directory.iterdir():
                if entry != place.parent:
                    (draft / entry.name).symlink_to(entry.resolve())
            for name, text in made.items():
                if not (draft / name).exists():
                    (draft / name).write_text(text, encoding="utf-8")
            draft.chmod(0o755)  # another user's server may share `root`, and would find it unreadable
            draft.rename(place)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            if not place.is_dir():  # where another process was faster
                raise
    except OSError as error:
        raise ArtefactError(
            f"the files that {directory} lacks of the Hugging Face format cannot be kept in {root}: "
            f"{error.strerror}; set SERVING_DOWNLOAD_DIR"
        ) from error
    logger.info("the model is in Mistral's own format; %s has what it lacks of the Hugging Face one", place)
    return place


def _lacks(directory: Path, theirs: str, ours: str) -> bool:
    return (directory / theirs).is_file() and not (directory / ours).is_file()


def _key(directory: Path) -> str:
    """Changes with the model's files."""
    seen = hashlib.sha256(_FORMAT + os.fsencode(directory.resolve()))
    try:
        for entry in sorted(entry for entry in directory.iterdir() if entry.is_file()):
            stat = entry.stat()
            seen.update(repr((entry.name, stat.st_size, stat.st_mtime_ns)).encode())
    except OSError as error:
        raise ArtefactError(f"{directory} cannot be read: {error.strerror}") from error
    return seen.hexdigest()[:24]


def _files(directory: Path) -> dict[str, str]:
    """Name -> text."""
    files: dict[str, Any] = {}
    params: Params | None = None
    tekken: Tekken | None = None
    template = None
    if (directory / TEKKEN).is_file():
        tekken = read_tekken(directory / TEKKEN)
    if _lacks(directory, PARAMS, "config.json"):
        params = read_params(directory / PARAMS)
        files["config.json"] = config_of(params, directory)
        if params.vision_encoder is not None:
            files |= processor_files(params.vision_encoder, None if tekken is None else tekken.longest)
    if tekken is not None and _lacks(directory, TEKKEN, "tokenizer.json"):
        files |= tokenizer_files(tekken)
        template = chat_template(tekken.config.version)
    made = {name: json.dumps(content, ensure_ascii=False) for name, content in files.items()}
    own = any((directory / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
    if template is not None and not own:
        made["chat_template.jinja"] = template
    return made
