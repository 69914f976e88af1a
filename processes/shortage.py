"""Whether something failed because this machine or process has run out of a resource: our failure, nobody else's."""

from __future__ import annotations

import errno
import os
import socket

_RESOURCES = {
    errno.EMFILE: "file descriptors",
    errno.ENFILE: "file descriptors",
    errno.EAGAIN: "processes or threads",
    errno.ENOMEM: "memory",
    errno.ENOBUFS: "memory for sockets",
    errno.ENOSPC: "disk space",
    errno.EDQUOT: "disk space",
    errno.EFBIG: "disk space",
}
_NO_THREAD = "can't start new thread"
_MOST_CAUSES = 20


def shortage(error: BaseException | None) -> str | None:
    """What was short when this error, or one that led to it, was raised; None where that was not the reason.

    Looks at the causes too: libraries wrap what the operating system told them.
    """
    for _ in range(_MOST_CAUSES):
        if error is None:
            return None
        if (found := _named(error)) is not None:
            return found
        error = error.__cause__ or error.__context__
    return None


def descriptors_left() -> bool:
    """Whether this process could open a file now. For failures that do not say what was short: a name look-up without
    descriptors claims that the name server did not answer."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno not in (errno.EMFILE, errno.ENFILE)
    return True


def _named(error: BaseException) -> str | None:
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, RuntimeError) and str(error) == _NO_THREAD:
        return "processes or threads"
    if isinstance(error, socket.gaierror):
        if error.errno == socket.EAI_MEMORY:
            return "memory"
        return None if descriptors_left() else "file descriptors"
    if isinstance(error, OSError) and error.errno is not None:
        return _RESOURCES.get(error.errno)
    return None
