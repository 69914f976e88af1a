"""When a child process that died is started again, and when it has failed too often."""

from __future__ import annotations

from processes.shortage import shortage

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
"""The first restart comes at once; the pause before each further one doubles."""

LONGEST_WAIT_SECONDS = 5.0
"""Between two starts for which this machine is short of something."""


class Restarts:
    """Of one child process after another under one name.

    A start that fails since this machine or process is short of descriptors, memory or processes is tried again until
    there are some: it says nothing about the child, so it is not counted.
    """

    def __init__(self, most_failures: int) -> None:
        """most_failures: in a row, with no answered request between them, that a restart answers."""
        self._most_failures = most_failures
        self._waits = 0
        self.failures = 0
        self.short: str | None = None
        """What the last start was short of."""

    @property
    def exhausted(self) -> bool:
        return self.failures > self._most_failures

    @property
    def pause(self) -> float:
        """Seconds to wait before the next start."""
        number = self.failures + self._waits
        if number <= 1:
            return 0.0
        longest = LONGEST_PAUSE_SECONDS if self.short is None else LONGEST_WAIT_SECONDS
        return min(longest, FIRST_PAUSE_SECONDS * 2.0 ** min(number - 2, 16))

    def died(self, *, served: bool) -> None:
        """served: it had answered a request, so what went before is over."""
        self.failures = 1 if served else self.failures + 1

    def failed(self, error: BaseException) -> None:
        """It did not start."""
        self.short = shortage(error)
        if self.short is None:
            self._waits = 0
            self.failures += 1
        else:
            self._waits += 1

    def succeeded(self) -> None:
        self._waits, self.short = 0, None

    def reason(self, name: str) -> str:
        """For health: why it is not there. name: "the engine", for example."""
        if self.short is None:
            return f"{name} is being restarted"
        return f"{name} is restarted as soon as it can be: the server is short of {self.short}"
