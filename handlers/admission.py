"""Back-pressure: how many answers may be waiting or generated at the same time."""

from __future__ import annotations

from types import TracebackType

from handlers.errors import InvalidRequest, Overloaded

RETRY_AFTER = 1.0


class Admission:
    """Counts answers that are generated or waited for. `capacity` is max_rolling_batch_size + job_queue_size."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.taken = 0

    @property
    def free(self) -> int:
        return self.capacity - self.taken

    def admit(self, answers: int) -> Permit:
        """Return a permit for this many answers at once.

        Raises:
            Overloaded: There is no space for them now.
            InvalidRequest: They are more than `capacity`.
        """
        if answers > self.capacity:
            raise InvalidRequest(
                f"the request asks for {answers} answers (n for each prompt); this server takes at most "
                f"{self.capacity} at once (max_rolling_batch_size and job_queue_size)"
            )
        if self.taken + answers > self.capacity:
            raise overloaded()
        self.taken += answers
        return Permit(self, answers)


def overloaded() -> Overloaded:
    """Return the refusal for a request that finds the queue full."""
    return Overloaded("too many requests are waiting: try again later", retry_after=RETRY_AFTER)


class Permit:
    """The queue places of one request. Releasing it twice has no effect."""

    def __init__(self, admission: Admission, answers: int) -> None:
        self._admission = admission
        self._answers = answers

    def release(self) -> None:
        self._admission.taken -= self._answers
        self._answers = 0

    def __enter__(self) -> Permit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
