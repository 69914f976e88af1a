"""Secrets of the command line, kept out of the process list.

Every user of a machine can read another process's arguments, but not its environment. So a process that was given
a key as an argument starts itself anew, under its own id, with the key in a variable.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from container.flags import Flags

_VARIABLE = "LMI_HIDDEN_OPTIONS"


def hide(flags: Flags, arguments: Sequence[str]) -> None:
    """Begin again without the secret flags; returns only where the process's own command line is not known.

    arguments: the last ones of that command line.
    """
    command = sys.orig_argv
    before = len(command) - len(arguments)
    if before < 1 or command[before:] != list(arguments) or not sys.executable:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    environ = {**os.environ, _VARIABLE: json.dumps(flags.secret)}
    os.execve(sys.executable, [*command[:before], *flags.public], environ)


def revealed() -> list[str]:
    """What `hide` has hidden, once: the processes that this one starts do not get it."""
    return [str(option) for option in json.loads(os.environ.pop(_VARIABLE, "[]"))]
