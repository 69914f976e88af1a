"""Machines that are network namespaces of this one: each with an address and a loopback of its own, on one link, and
reachable from nowhere else. What a test starts and asks inside one is on that machine."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_CLONE_NEWNET = 0x40000000
LINK = "lmi0"


class Machines:
    """Use as a context manager. Raises OSError or CalledProcessError where this process may not make namespaces."""

    def __init__(self, count: int = 2) -> None:
        self.names = [f"lmi{os.getpid()}-{number}" for number in range(count)]
        self.addresses = [f"10.77.0.{number + 1}" for number in range(count)]

    def __enter__(self) -> Machines:
        try:
            for name in self.names:
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            first, second = self.names
            _ip("link", "add", LINK, "netns", first, "type", "veth", "peer", "name", LINK, "netns", second)
            for name, address in zip(self.names, self.addresses, strict=True):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", LINK)
                _ip("-n", name, "link", "set", LINK, "up")
                # To nowhere: who asks which address a packet to the internet would have, learns this one.
                _ip("-n", name, "route", "add", "default", "via", "10.77.0.254")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            if Path("/run/netns", name).exists():
                _ip("netns", "del", name)

    @contextmanager
    def on(self, number: int) -> Iterator[None]:
        """This thread, and the processes and threads that it starts, are on that machine meanwhile."""
        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _enter(Path("/run/netns", self.names[number]))
            yield
        finally:
            _set(here)
            os.close(here)

    def of(self, pid: int) -> int:
        """The machine that a process runs on. Raises ValueError when it is another."""
        inodes = [Path("/run/netns", name).stat().st_ino for name in self.names]
        return inodes.index(Path(f"/proc/{pid}/ns/net").stat().st_ino)


def until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s"
        time.sleep(0.1)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


def _enter(namespace: Path) -> None:
    there = os.open(namespace, os.O_RDONLY)
    try:
        _set(there)
    finally:
        os.close(there)


def _set(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
