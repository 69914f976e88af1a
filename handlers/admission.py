"""How many answers a server may work on: those that are generated and those that wait."""

from __future__ import annotations

from handlers.errors import InvalidRequest, overloaded


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


class Permit:
    """The queue places of one request. Releasing it twice has no effect."""

    def __init__(self, admission: Admission, answers: int) -> None:
        self._admission = admission
        self._answers = answers

    def release(self) -> None:
        self._admission.taken -= self._answers
        self._answers = 0
