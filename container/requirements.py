"""Installs the packages that the model's own code needs: the requirements.txt beside it."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from handlers.custom.find import find_code, own_directory
from handlers.errors import InvalidConfiguration
from processes.environment import child_command, child_environment
from properties.configuration import Configuration

logger = logging.getLogger(__name__)

_FILE = "requirements.txt"
_MOST_CHARACTERS = 600
"""The length of pip's reason in the message; the log has all of it."""

_LOGGED_LINES = 100
_LOGIN = re.compile(r"(?<=://)[^/\s]+@")
_QUERY = re.compile(r"(://[^\s?]*\?)[^\s#]+")
"""What follows the question mark of a URL, where indexes that know no login take their tokens."""


def requirements_to_install(configuration: Configuration, model_path: Path) -> Path | None:
    """Return the requirements.txt that is to be installed; log why one that exists is not.

    By default it is the one beside code of the model's own that is going to run: its author is trusted with as much
    already. One of a model that comes from the hub never is, since its author is not the operator.
    """
    wanted = configuration.settings.install_requirements
    home = own_directory(configuration, model_path)
    own = find_code(configuration, model_path)
    if home is None:
        if wanted and (model_path / _FILE).is_file():
            logger.warning("%s of a model from the hub is not installed: its author is not the operator", _FILE)
        return None
    places = [home] if own is None else [(own.directory / own.file).parent, home]
    found = next((place / _FILE for place in places if (place / _FILE).is_file()), None)
    if found is None or wanted or (wanted is None and own is not None):
        return found
    why = "install_requirements=false" if own is not None else "no code of the model's own runs"
    logger.warning("%s of the model is not installed: %s (SERVING_INSTALL_REQUIREMENTS=true)", _FILE, why)
    return None


async def install(file: Path, offline: bool) -> tempfile.TemporaryDirectory[str]:
    """Install what a requirements.txt names into a new directory, and put that on the path of child processes.

    Packages that the server has stay as they are: another version of one of them is refused. A folder `lib` beside the
    file that holds wheels is all that pip may take packages from; a folder `requirements` is searched first.

    Args:
        file: The requirements.txt.
        offline: Whether no index may be asked.

    Returns:
        The directory, which must exist for as long as the child processes run.

    Raises:
        InvalidConfiguration: pip could not install it; the message has pip's reason.
    """
    target = tempfile.TemporaryDirectory(prefix="lmi-requirements-", ignore_cleanup_errors=True)
    try:
        logger.info("installing %s", file)
        status, lines = await _run(_command(file, target.name, offline), file.parent)
        if status != 0:
            for line in lines[-_LOGGED_LINES:]:
                logger.info("pip: %s", line)
            raise InvalidConfiguration(f"{file} cannot be installed: {_reason(lines, status)}")
    except BaseException:
        target.cleanup()
        raise
    found = _packages_in(target.name)
    # At the end of this process's path, for code of the model that vLLM imports here.
    sys.path.extend(found)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *found]))
    return target


def _command(file: Path, target: str, offline: bool) -> list[str]:
    versions: dict[str, str] = {}
    for one in metadata.distributions():  # in the order of the path: the first is what is imported
        versions.setdefault(one.name, one.version)
    constraints = Path(target, "constraints.txt")
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in versions.items() if name))
    folders = [file.parent.absolute() / name for name in ("lib", "requirements")]
    links = [folder for folder in folders if any(folder.glob("*.whl")) or any(folder.glob("*.tar.gz"))]
    # fmt: off
    return [
        *child_command("pip", "install"), "--no-input", "--no-cache-dir", "--disable-pip-version-check",
        "--progress-bar=off", "--prefix", target, "-c", str(constraints), "-r", file.name,
        *(f"--find-links={folder}" for folder in links),
        *(["--no-index"] if offline or folders[0] in links else []),
    ]
    # fmt: on


def _packages_in(target: str) -> list[str]:
    """Return the directories below a prefix that belong on the path: Debian's Python puts `local` before them."""
    return [str(path) for lib in ("lib*", "local/lib*") for path in Path(target).glob(f"{lib}/python*/*-packages")]


async def _run(command: Sequence[str], directory: Path) -> tuple[int, list[str]]:
    """Return a program's status and what it printed. Cancelled, it leaves nothing running."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=directory,
        env=child_environment("handler") | {"PYTHONUNBUFFERED": "1"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = await process.communicate()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also compilers that pip has started
        await process.wait()
        raise
    assert process.returncode is not None
    text = _QUERY.sub(r"\1****", _LOGIN.sub("****@", output.decode(errors="replace")))
    return process.returncode, [line.strip() for line in text.splitlines() if line.strip()]


def _reason(lines: Sequence[str], status: int) -> str:
    """Return pip's errors in one line."""
    first = next((at for at, line in enumerate(lines) if line.lower().startswith("error:")), None)
    if first is None:
        return " ".join(lines[-1:]) or f"pip ended with status {status}"
    told = " ".join(line for line in lines[first:] if not line.startswith(("[notice]", "WARNING:")))
    told = told.partition(" To fix this you could")[0]
    told = told if len(told) <= _MOST_CHARACTERS else f"{told[:_MOST_CHARACTERS]}…"
    if "(constraint)" in told:
        told += "; a constraint is the version that the server has itself: an image of your own may hold another"
    return told
