"""The process in which clients' grammars are compiled for the first time: `python -m handlers.grammars.worker`.

A grammar may be made to compile for minutes, to fill the memory, or to overflow the compiler's stack; none of this can
be ended inside a process that others need. This one can be killed, and what it has survived, the engine compiles too.

It is told the `Vocabulary`, then `Job`s. It sends an empty message when it is ready, then an `Outcome` for each job.
"""

from __future__ import annotations

import os
import random
import resource
import time

import msgspec
import numpy as np

from engine.config import Vocabulary
from engine.guidance import GrammarError, Guidance
from handlers.grammars.messages import Job, Outcome
from handlers.grammars.source import grammar_of
from processes.inside import Parent, data_bytes, resident_bytes

MEMORY_BYTES = 192 << 20
"""What compiling may take beyond what the process has when it is ready."""

KEPT_BYTES = 64 << 20
"""When it has grown by that much, the process ends after its reply."""

TRIAL_STEPS = 16
TRIAL_SEED = 20240717

STEP_SECONDS = 0.25
"""Most processor time for saying what may come next. Usual is a thousandth of it."""


def compiled(job: Job, guidance: Guidance) -> Outcome:
    """Compile it and take some steps at random, so that what would fail an answer at once fails here."""
    try:
        grammar = grammar_of(job.kind, job.value, job.whitespace_pattern)
        _try_out(grammar, guidance)
    except GrammarError as error:
        return Outcome(reason=str(error))
    except MemoryError:
        return Outcome(reason="it takes too much memory to compile", last=True)
    return Outcome(grammar)


def _try_out(grammar: str, guidance: Guidance) -> None:
    (guide,) = guidance.build(grammar, 1)
    chance = random.Random(TRIAL_SEED)
    for _ in range(TRIAL_STEPS):
        begin = time.process_time()
        (mask,) = guidance.fill([guide])
        if guide.reason is not None:
            raise GrammarError(guide.reason)
        if time.process_time() - begin > STEP_SECONDS:
            raise GrammarError("it takes too long to tell what may come next: make it simpler")
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        allowed = allowed[~np.isin(allowed, guidance.eos_token_ids)]
        if not len(allowed):
            return
        guide.accept(int(chance.choice(allowed)))


def main() -> None:
    parent = Parent()
    first = parent.receive()
    if first is None:
        return
    guidance = Guidance(msgspec.msgpack.decode(first, type=Vocabulary), most_compiled=0)
    compiled(Job("json_object", None, None), guidance)  # so that all threads are there
    _quiet()
    _limit_memory()
    start = resident_bytes() or 0
    parent.send(b"")
    while (message := parent.receive()) is not None:
        outcome = compiled(msgspec.msgpack.decode(message, type=Job), guidance)
        if (resident_bytes() or 0) > start + KEPT_BYTES:
            outcome = msgspec.structs.replace(outcome, last=True)
        parent.send(msgspec.msgpack.encode(outcome))
        if outcome.last:
            return


def _quiet() -> None:
    """What the compiler prints when it gives up may hold what the client wrote."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if data := data_bytes():
        # not the address space, of which the allocator reserves far more for each thread than it uses
        limit = data + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main()
