"""Chooses which sequences the next step computes, and how many tokens of each: one budget, no phases, decodes first."""

from __future__ import annotations

import time
from bisect import insort
from dataclasses import dataclass, field

from engine.block_pool import BlockPool
from engine.messages import ImageInput
from engine.sequence import Sequence
from engine.step_time import StepTime


@dataclass(slots=True)
class Chunk:
    """The tokens [start, start + length) of a sequence, to be computed in one step.

    Attributes:
        drafts: Tokens that may follow, and are computed as well to find out. Only decodes have them.
    """

    sequence: Sequence
    start: int
    length: int
    drafts: list[int] = field(default_factory=list)

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def images(self) -> list[ImageInput]:
        """The images whose encoder outputs are needed to compute the chunk."""
        return self.sequence.images_for(self.start, self.stop)

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the newest token, so that its last logits choose the next one."""
        return self.stop == self.sequence.num_tokens


class Scheduler:
    """Keeps the waiting and running sequences, and cuts the batch of each step from them.

    Sequences with one uncomputed token (decodes) come before those with more, so a long prompt never delays a
    completion that is being streamed. The rest of the token budget goes to prompts: running ones first, then waiting
    ones in order of rank. When blocks run out, the running sequence of the last rank loses its blocks and returns to
    the queue; its tokens are computed again later, although many of them can often still be found as a cached prefix.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        vocab_size: int,
        image_slots: int | None = None,
        max_step_seconds: float | None = None,
    ) -> None:
        """Create a scheduler without sequences.

        Args:
            pool: Key/value blocks.
            max_num_seqs: Greatest number of running sequences.
            max_num_batched_tokens: Token budget of a step; at least `max_num_seqs`.
            vocab_size: Number of tokens that can be drafted.
            image_slots: Number of images that all running sequences may hold together; None where there is no limit.
            max_step_seconds: See `StepTime`.
        """
        assert max_num_batched_tokens >= max_num_seqs, "the budget must hold one token for every sequence"
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.vocab_size = vocab_size
        self.image_slots = image_slots
        self.time = StepTime(max_step_seconds)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=lambda s: s.rank)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and release its blocks."""
        sequence.finished = True
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.pool.release(sequence)

    def schedule(self) -> list[Chunk]:
        """Cut the next batch; it is empty only when there is no work."""
        chunks: list[Chunk] = []
        budget = self.max_num_batched_tokens
        prompts = self._prompt_tokens()
        spare = budget - len(self.running)  # drafts leave a token for every running sequence
        preempted: set[int] = set()
        for sequence in sorted(self.running, key=lambda s: (not s.is_decoding, s.rank)):
            left = budget if sequence.is_decoding else min(budget, prompts)
            if left == 0:
                break
            if sequence.request_id in preempted:
                continue
            length = self._chunk_length(sequence, left, chunks)
            if length == 0:
                continue
            if self._allocate(sequence, sequence.num_computed + length, chunks, preempted):
                drafts = self._draft(sequence, spare)
                spare -= len(drafts)
                chunks.append(Chunk(sequence, sequence.num_computed, length, drafts))
                budget = max(0, budget - length - len(drafts))
                prompts -= 0 if sequence.is_decoding else min(length, prompts)
        budget = self.max_num_batched_tokens - sum(chunk.length + len(chunk.drafts) for chunk in chunks)
        if not preempted:
            self._admit(chunks, min(budget, prompts))
        return chunks

    def _draft(self, sequence: Sequence, budget: int) -> list[int]:
        """Draft what fits into the budget, the answer, and the free blocks: nothing is preempted for a draft."""
        if sequence.lookup is None or not sequence.is_decoding or self.pool.num_free <= len(self.running):
            return []
        # The token after the drafted ones is sampled in the same step.
        left = sequence.max_tokens - sequence.num_output_tokens - 1
        drafts = sequence.lookup.draft(sequence.token_ids, min(budget, left))
        outside = next((i for i, token in enumerate(drafts) if token >= self.vocab_size), len(drafts))
        drafts = drafts[:outside]  # the token of an image may have no embedding
        return drafts if self.pool.allocate(sequence, sequence.num_tokens + len(drafts)) else []

    def _prompt_tokens(self) -> int:
        """Return how many prompt tokens the step may compute: all, unless requests that stream would wait too long."""
        fits = self.time.prompt_tokens()
        if fits is None or not any(sequence.is_decoding for sequence in self.running):
            return self.max_num_batched_tokens
        return min(fits, self.max_num_batched_tokens)

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        """Start waiting sequences while there are tokens, image slots and blocks for them."""
        blocked = False
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.max_num_seqs:
                return
            if self.pool.prefix_caching and sequence.waits_for_leader:
                continue
            if sequence.images and (blocked or not self._images_fit(sequence)):
                # those without images need not wait for places, those with images keep their order
                blocked = True
                continue
            sequence.num_computed = self.pool.reuse_prefix(sequence)
            length = self._chunk_length(sequence, budget, chunks)
            if length == 0 or not self._fits(sequence, sequence.num_computed + length):
                self.pool.release(sequence)
                sequence.num_computed = 0
                return
            self.pool.allocate(sequence, sequence.num_computed + length)
            if sequence.cached_tokens < 0:
                sequence.cached_tokens = sequence.num_computed
                sequence.queued = time.monotonic() - sequence.arrived
                self.pool.count(sequence)
            self.waiting.remove(sequence)
            self.running.append(sequence)
            chunks.append(Chunk(sequence, sequence.num_computed, length))
            budget -= length

    def _chunk_length(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """How many tokens of the sequence the step computes: within the budget, and never part of a span.

        A span that exceeds the budget waits for a step without another prompt, and then exceeds it.
        """
        start = sequence.num_computed
        stop = sequence.uncut(start, start + min(sequence.num_uncomputed, budget))
        if stop == start and all(chunk.length == 1 for chunk in chunks):
            stop = min(sequence.span_end(start), sequence.num_tokens)
        return stop - start

    def _images_fit(self, sequence: Sequence) -> bool:
        """Whether there are slots for the sequence's images and the running sequences' images together."""
        if self.image_slots is None:
            return True
        held = {image.digest for other in (*self.running, sequence) for image in other.images}
        return len(held) <= self.image_slots

    def _fits(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether there are enough blocks.

        One more is kept for each running sequence, so that admission does not cause preemption.
        """
        return self.pool.missing(sequence, num_tokens) + len(self.running) <= self.pool.num_free

    def _allocate(self, sequence: Sequence, num_tokens: int, chunks: list[Chunk], preempted: set[int]) -> bool:
        """Allocate for `sequence`, preempting from the last rank up; False if it was preempted itself."""
        while not self.pool.allocate(sequence, num_tokens):
            victim = max(self.running, key=lambda s: s.rank)
            self.restart(victim)
            self.preemptions += 1
            preempted.add(victim.request_id)
            chunks[:] = [chunk for chunk in chunks if chunk.sequence is not victim]
            if victim is sequence:
                return False
        return True

    def restart(self, sequence: Sequence) -> None:
        """Have a running sequence computed again from its first token."""
        self.running.remove(sequence)
        self.pool.release(sequence)
        sequence.num_computed = 0
        sequence.block_hashes.clear()
        self.add(sequence)
