"""Whether something failed because this machine or process ran out of a resource."""

from __future__ import annotations

import errno
import os
import socket

_RESOURCES = {
    errno.EMFILE: "file descriptors",
    errno.ENFILE: "file descriptors",
    errno.ENOMEM: "memory",
    errno.ENOBUFS: "memory for sockets",
    errno.ENOSPC: "disk space",
    errno.EDQUOT: "disk space",
    errno.EFBIG: "disk space",
}
_NO_PROCESS_OR_THREAD = "processes or threads"
_NO_THREAD = "can't start new thread"
_MAX_CAUSES = 20

_STARTS_OF_PROCESSES = frozenset(
    {
        ("subprocess", "_execute_child"),
        ("multiprocessing.popen_fork", "_launch"),
        ("multiprocessing.util", "spawnv_passfds"),
        ("uvloop.loop", "uvloop.loop.UVProcess._init"),
    }
)
"""Functions, by module, that raise EAGAIN when the operating system cannot start a process."""


def shortage(error: BaseException | None) -> str | None:
    """Return the resource whose shortage caused this error; None if the reason is another one.

    It examines the causes, too, because libraries wrap the operating system's errors.
    """
    for _ in range(_MAX_CAUSES):
        if error is None:
            return None
        if (found := _named(error)) is not None:
            return found
        error = error.__cause__ or error.__context__
    return None


def descriptors_left() -> bool:
    """Whether this process could open a file now.

    It is for failures that do not say what was short: a name look-up without descriptors claims that the name server
    did not answer.
    """
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno not in (errno.EMFILE, errno.ENFILE)
    return True


def _named(error: BaseException) -> str | None:
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, RuntimeError) and str(error) == _NO_THREAD:
        return _NO_PROCESS_OR_THREAD
    if isinstance(error, socket.gaierror):
        if error.errno == socket.EAI_MEMORY:
            return "memory"
        return None if descriptors_left() else "file descriptors"
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno == errno.EAGAIN:
            return _NO_PROCESS_OR_THREAD if _raised_by_start(error) else None
        return _RESOURCES.get(error.errno)
    return None


def _raised_by_start(error: OSError) -> bool:
    """Whether EAGAIN is about a new process; for a socket or pipe it only says that there is nothing to read yet."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    return (trace.tb_frame.f_globals.get("__name__"), trace.tb_frame.f_code.co_name) in _STARTS_OF_PROCESSES
