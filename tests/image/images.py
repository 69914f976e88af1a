"""The real image, built where no registry can be reached: on a base that debootstrap makes, cached between runs.

LMI_IMAGE_CACHE: where base, layers and image are kept; ~/.cache/lmi-image where it is not set. Remove it with
`make remove-test-image`.
LMI_IMAGE: an image that podman has there already, which is tested as it is.
LMI_IMAGE_BASE: a base image to pull instead, e.g. docker.io/library/python:3.12-slim-bookworm.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.shapes import ROOT

CACHE = Path(os.environ.get("LMI_IMAGE_CACHE") or "~/.cache/lmi-image").expanduser()
IMAGE = "localhost/lmi-handler:cpu"

_BASE = "localhost/debian:bookworm-slim"
_MIRROR = "http://deb.debian.org/debian"
_TOOLS = ("buildah", "podman", "debootstrap", "unshare")
_BUILD_SECONDS = 1200
_LARGEST_CACHE = 6 * 2**30
"""Bytes. Layers of earlier versions stay, a few megabytes each, or a gigabyte where the dependencies changed."""


class CannotBuild(Exception):
    """What this machine lacks; the message is for people."""


def podman(*arguments: str) -> list[str]:
    """A podman command on the cache's images; `run` needs `run_options` too."""
    return ["podman", *_store(), "--cgroup-manager=cgroupfs", "--runtime", str(_runtime()), *arguments]


def build() -> str:
    """The image's name, once it is built from this checkout. Raises CannotBuild; a build that fails raises
    CalledProcessError, its output having been shown."""
    lacking = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if named := os.environ.get("LMI_IMAGE"):
        return named
    if os.getuid() != 0 or lacking:
        reason = f"{', '.join(lacking)} not installed" if lacking else "only root can build without a registry"
        raise CannotBuild(f"the image cannot be built here: {reason}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with _alone(), tempfile.TemporaryDirectory() as folder:
        _bound_the_cache()
        base = os.environ.get("LMI_IMAGE_BASE") or _debian()
        _try_run(base)
        configured = _pip_configuration(Path(folder))
        arguments = [
            *("--isolation=chroot", "--network=host", "--format=docker", "--layers", "--target", "cpu"),
            *("--build-arg", f"CPU_BASE={base}"),
            *(("--build-arg", "TORCH_INDEX=") if configured else ()),
            *(part for mount in configured for part in ("--volume", mount)),
            *("--tag", IMAGE, "--file", str(ROOT / "docker/Dockerfile"), str(ROOT)),
        ]
        done = _run(["buildah", *_store(), "bud", *arguments], seconds=_BUILD_SECONDS)
        if done.returncode:
            print(done.stdout[-8000:], done.stderr[-8000:], file=sys.stderr)
        done.check_returncode()
    return IMAGE


def remove() -> None:
    """Everything that was made, the cache included."""
    if shutil.which("podman") is not None and CACHE.is_dir():
        _run(podman("rm", "--all", "--force"))
        _run(["buildah", *_store(), "rm", "--all"])
        _run(podman("rmi", "--all", "--force"))
    for merged in (CACHE / "storage" / "overlay").glob("*/merged"):
        _run(["umount", str(merged)])
    _run(["umount", str(CACHE / "storage" / "overlay")])
    shutil.rmtree(CACHE, ignore_errors=True)


def _bound_the_cache() -> None:
    """Drop what a build left that was ended by force, and everything where too much has gathered."""
    _run(["buildah", *_store(), "rm", "--all"])
    listed = _run(["du", "--summarize", "--one-file-system", "--block-size=1", str(CACHE)]).stdout.split()
    if listed and int(listed[0]) > _LARGEST_CACHE:
        _run(podman("rmi", "--all", "--force"))


def _debian() -> str:
    if _run(podman("image", "exists", _BASE)).returncode == 0:
        return _BASE
    files = CACHE / "rootfs"
    shutil.rmtree(files, ignore_errors=True)
    included = "--include=ca-certificates,python3,python3-venv"
    made = _run(["debootstrap", "--variant=minbase", included, "bookworm", str(files), _MIRROR], seconds=300)
    if made.returncode:
        raise CannotBuild(f"debootstrap cannot make the base: {(made.stdout + made.stderr)[-300:]}")
    shutil.rmtree(files / "var/cache/apt", ignore_errors=True)
    shutil.rmtree(files / "var/lib/apt/lists", ignore_errors=True)
    packed = CACHE / "base.tar"
    _run(["tar", "-C", str(files), "-c", "-f", str(packed), "."]).check_returncode()
    try:
        _run(podman("import", str(packed), _BASE)).check_returncode()
    finally:
        packed.unlink()
        shutil.rmtree(files, ignore_errors=True)
    return _BASE


def _try_run(base: str) -> None:
    tried = _run(podman("run", "--rm", *run_options(), base, "true"))
    if tried.returncode:
        raise CannotBuild(f"containers cannot be run here: {tried.stderr.strip()[-300:]}")


def run_options(given: Sequence[str] = ()) -> tuple[str, ...]:
    """Of every `podman run`: what it needs here, the host's network unless another is given, and what is given."""
    network = () if any(option.startswith("--network") for option in given) else ("--network=host",)
    return ("--cgroups=disabled", "--no-healthcheck", *network, *given)


def _pip_configuration(folder: Path) -> list[str]:
    """Mounts that give a build what pip is configured with on this machine; none where it has no index of its own."""
    listed = _run([sys.executable, "-m", "pip", "config", "list"]).stdout
    values = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        values[name.rpartition(".")[2]] = value.strip("'\"").replace("\\n", " ")
    wanted = {name: values[name] for name in ("index-url", "extra-index-url", "find-links") if name in values}
    if not wanted:
        return []
    mounts = {}
    for places in wanted.values():
        for place in places.split():
            local = Path(place.removeprefix("file://"))
            if local.is_absolute() and local.exists():
                # A simple index links to the files beside it.
                folder_of = local.parent if place.startswith("file:") else local
                mounts[folder_of] = folder_of
    for name in ("constraint", "cert"):
        if name in values:
            wanted[name] = f"/run/pip/{name}"
            mounts[Path(values[name])] = Path(wanted[name])
    written = folder / "pip.conf"
    written.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in wanted.items()))
    written.chmod(0o644)
    mounts[written] = Path("/etc/pip.conf")
    return [f"{source}:{target}:ro" for source, target in mounts.items()]


@functools.cache
def _store() -> tuple[str, ...]:
    """Where images are kept: copies of whole file systems where the kernel cannot lay them over each other."""
    places = ("--root", str(CACHE / "storage"), "--runroot", str(CACHE / "run"))
    overlay = (*places, "--storage-driver", "overlay")
    known = (CACHE / "storage" / "overlay").is_dir()
    if known or _run(["podman", *overlay, "info"]).returncode == 0:
        return overlay
    return (*places, "--storage-driver", "vfs")


@functools.cache
def _runtime() -> Path:
    return Path(__file__).parent / "crun"


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Two builds at once would each make a base."""
    with open(CACHE / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: list[str], seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """As subprocess.run. What is out of time is ended with all that it has started."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that `_run` ends what it started
    if sys.argv[1:] == ["--remove"]:
        remove()
    else:
        try:
            print(build())
        except CannotBuild as error:
            print(f"{error}; the tests are skipped")
