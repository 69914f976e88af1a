"""vLLM's engine must not outlive the front, however that ends: nobody would reach it, and it holds the devices."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Sequence

from handlers.backends.vllm.engine.processes import Process
from processes.environment import child_environment

logger = logging.getLogger(__name__)

_SCRIPT = """
same() {
    read -r line 2>/dev/null <"/proc/$1/stat" || return 1
    set -- "$2" ${line##*) }
    [ "$1" = "${21}" ]
}
cat >/dev/null
for process; do
    same "${process%:*}" "${process#*:}" && kill -9 "${process%:*}" 2>/dev/null
done
"""
"""`cat` ends with the last copy of its standard input's other end: that of the front, which gives it to no child.
A process id may be another's by then; the 20th field after the name in /proc/PID/stat, its start, is not."""


class Guard:
    """A process that kills others when this one is gone, even if it was killed itself."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self.processes = processes
        self._process: subprocess.Popen[bytes] | None = None
        if not processes:
            return
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _SCRIPT, "sh", *(f"{one.pid}:{one.started}" for one in processes)],
                stdin=subprocess.PIPE,
                env=child_environment("plain"),
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
