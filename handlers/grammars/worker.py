"""The process that compiles clients' grammars for the first time: `python -m handlers.grammars.worker`.

A client can write a grammar that compiles for minutes, fills the memory or overflows the compiler's stack. This process
can be killed meanwhile; a grammar that it survives is compiled by the engine, too.

It receives the `Vocabulary`, then `Job`s. It sends an empty message when it is ready, then an `Outcome` for each job.
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
"""Memory for compiling, beyond that of the process when it is ready."""

KEPT_BYTES = 64 << 20
"""When the process has grown by that much, it ends after its reply."""

TRIAL_STEPS = 16
TRIAL_SEED = 20240717

STEP_SECONDS = 0.25
"""Greatest processor time for computing which tokens may come next; it usually takes a thousandth of this."""


def compiled(job: Job, guidance: Guidance) -> Outcome:
    """Compile a constraint, and take some random steps to detect a grammar that would soon fail."""
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
            raise GrammarError("it takes too long to compute what may come next: make it simpler")
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        allowed = allowed[~np.isin(allowed, guidance.eos_token_ids)]
        if not len(allowed):
            return
        guide.accept(int(chance.choice(allowed)))


def main() -> None:
    """Compile constraints until the parent closes the connection."""
    parent = Parent()
    first = parent.receive()
    if first is None:
        return
    guidance = Guidance(msgspec.msgpack.decode(first, type=Vocabulary), most_compiled=0)
    compiled(Job("json_object", None, None), guidance)  # starts all threads
    _discard_output()
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


def _discard_output() -> None:
    """Discard the compiler's output, which may contain what the client wrote."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if data := data_bytes():
        # The address space is not limited: the allocator reserves far more of it for each thread than it uses.
        limit = data + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main()
