"""vLLM's engine must not outlive the front, however that ends: nobody would reach it, and it holds the devices."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Sequence

logger = logging.getLogger(__name__)

_SCRIPT = 'cat >/dev/null; kill -9 "$@" 2>/dev/null'
"""Ends with the last copy of its standard input's other end: that of the front, which gives it to no child."""


class Guard:
    """A process that kills others when this one is gone, even if it was killed itself."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if not pids:
            return
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _SCRIPT, "sh", *map(str, pids)],
                stdin=subprocess.PIPE,
                start_new_session=True,  # what is typed at a terminal goes to the front alone
            )
        except OSError as error:
            logger.warning("without /bin/sh an engine may outlive a killed server: %s", error)

    def release(self) -> None:
        """Let them live. Safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return
        # The shell and its `cat` are one session; the shell must not see its input end first.
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
