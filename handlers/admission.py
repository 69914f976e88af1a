"""Back-pressure: how many prompts may be under way at the same time."""

from __future__ import annotations

from types import TracebackType

from handlers.errors import InvalidRequest, Overloaded

RETRY_AFTER = 1.0


class Admission:
    """Counts prompts that generate or wait. `capacity` is max_rolling_batch_size + job_queue_size."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.taken = 0

    def admit(self, prompts: int) -> Permit:
        """A permit at once, or Overloaded. InvalidRequest for more prompts than there are places at all."""
        if prompts > self.capacity:
            raise InvalidRequest(
                f"the request holds {prompts} prompts; at most {self.capacity} are taken at once"
            )
        if self.taken + prompts > self.capacity:
            raise Overloaded("too many requests are waiting: try again later", retry_after=RETRY_AFTER)
        self.taken += prompts
        return Permit(self, prompts)


class Permit:
    """Places of one request; released once, however often it is asked to."""

    def __init__(self, admission: Admission, prompts: int) -> None:
        self._admission = admission
        self._prompts = prompts

    def release(self) -> None:
        self._admission.taken -= self._prompts
        self._prompts = 0

    def __enter__(self) -> Permit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
