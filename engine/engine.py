"""The engine: requests in, one step at a time, tokens out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import TypeVar

import torch

from engine.block_pool import BlockPool
from engine.commands import ChunkInput, Encode, Run, Scrub, Trim
from engine.config import EngineConfig, Vocabulary
from engine.errors import NO_TOKEN_LEFT, EngineError, ModelLoadError
from engine.executor import Executor
from engine.guidance import Built, GrammarError, Guidance, Guide
from engine.messages import Add, Logprobs, Output, Stats
from engine.runner import StepLogits
from engine.sampler import INVALID, Sampler, prompt_logprobs
from engine.sampling_params import SamplingParams
from engine.scheduler import Chunk, Scheduler
from engine.sequence import Sequence

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)

INTERNAL_ERROR = "the engine failed on this request"
NO_PROBABILITIES = "the model gave no usable probabilities for this request"

ENCODE_PER_STEP = 32
"""Greatest number of images that a step encodes."""

PROMPT_LOGITS = 1 << 24
"""Greatest number of logits that are computed at a time for the log probabilities of prompts."""

MOST_LOST_STEPS = 8
"""Number of consecutive steps that fail for every request, each alone, before the process is considered broken."""

WARM_UP_TOKENS = 32


class Engine:
    """Schedules, runs and samples. Add requests, and call `step` while `has_work`.

    Each step returns the outputs of all completions that got a token.
    """

    def __init__(self, config: EngineConfig, executor: Executor) -> None:
        self.executor = executor
        self.runner = runner = executor.runner
        budget = config.max_num_batched_tokens or (512 if runner.device.type == "cpu" else 8192)
        self.pool = BlockPool(runner.num_blocks, runner.block_size, prefix_caching=config.enable_prefix_caching)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max(budget, config.max_num_seqs),
            vocab_size=runner.vocab_size,
            image_slots=runner.image_slots,
            max_step_seconds=config.max_step_seconds,
        )
        self.sampler = Sampler(runner.vocab_size, runner.device)
        self.guidance = _load_guidance(config.vocabulary)
        self._sequences: dict[int, Sequence] = {}
        self._arrivals = 0
        self._lost_steps = 0
        self._steps = 0
        self._outputs: list[Output] = []
        self._lookup = config.lookup
        self._drafted = self._accepted = 0

    @classmethod
    def load(cls, config: EngineConfig) -> Engine:
        """Load the model on all of `config.devices`.

        Raises:
            ModelLoadError: The model cannot be loaded.
        """
        return cls(config, Executor.load(config))

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, add: Add, guides: list[Guide] | None = None) -> list[Output]:
        """Queue a request.

        Args:
            add: The request.
            guides: From `Guidance.build`, one for each completion of a request with a grammar.

        Returns:
            The outputs of a request that is refused at once; otherwise nothing.
        """
        assert len(guides or ()) == (0 if add.grammar is None else len(add.seeds))
        runner, model, count = self.runner, self.runner.model, len(add.token_ids)
        if not 0 < count < runner.max_model_len:
            return _failures(add.choice_ids, f"the prompt has {count} tokens; allowed: 1 to {runner.max_model_len - 1}")
        if min(add.token_ids) < 0 or (not add.images and max(add.token_ids) >= runner.vocab_size):
            return _failures(add.choice_ids, "the prompt holds a token id outside the vocabulary")
        slots, images = runner.image_slots, len({image.digest for image in add.images})
        if slots is not None and images > slots:
            reason = f"the request has {images} different images; this server's memory holds {slots} at a time"
            return _failures(add.choice_ids, reason, invalid=True)
        try:
            sequences = Sequence.from_message(
                add,
                max_model_len=runner.max_model_len,
                order=self._arrivals,
                guides=guides or (),
                prefix_salt=model.prefix_salt(add.token_ids, add.images),
                long_after=None if model.long_rope is None else model.long_rope.limit,
                attends_images=model.attends_images,
                spans=model.spans(add.token_ids, add.images),
                lookup=self._lookup,
            )
        except (ValueError, OverflowError, TypeError):
            logger.exception("a request's parameters cannot be used")
            return _failures(add.choice_ids, "the sampling parameters are out of range")
        self._arrivals += len(sequences)
        for image in add.images:
            runner.encoder_cache.count(image.digest)
        for sequence in sequences:
            self._sequences[sequence.request_id] = sequence
            self.scheduler.add(sequence)
        return []

    def add_built(self, built: Built) -> list[Output]:
        """Add a request whose grammar has been compiled, or refuse it if that failed."""
        wanted = [request_id for request_id in built.add.choice_ids if request_id not in built.aborted]
        if built.reason is not None:
            return _failures(wanted, built.reason, invalid=True)
        if not wanted:
            return []
        outputs = self.add(built.add, built.guides)
        for request_id in built.aborted:
            self.abort(request_id)
        return outputs

    def warm_up(self) -> None:
        """Complete a first request, so that "ready" means that the model can generate; then capture CUDA graphs.

        Raises:
            ModelLoadError: The model cannot generate.
        """
        length = min(WARM_UP_TOKENS, self.runner.max_model_len - 2)
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        outputs = self.add(Add(-1, [0] * max(1, length), params, [0], ()))
        for _ in range(WARM_UP_TOKENS):
            if not self.has_work:
                break
            outputs += self.step()
        if not outputs or outputs[-1].finish != "length":
            reason = outputs[-1].error if outputs else "it gave no token"
            if reason == NO_PROBABILITIES:
                reason = "its logits are NaN or infinite; its weights are damaged, or too large for option.dtype"
            elif reason == INTERNAL_ERROR:
                reason = "its first step failed, as logged above"
            raise ModelLoadError(f"the model was loaded but cannot generate: {reason}")
        if self.runner.graphs is not None:
            self.runner.graphs.capture()
        self.pool.queries = self.pool.hits = self._steps = self._drafted = self._accepted = 0

    def abort(self, request_id: int) -> None:
        """Forget the request; unknown ids, such as of a request that has just finished, are ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self.scheduler.remove(sequence)

    def step(self) -> list[Output]:
        """Run the model once. A request that makes it fail gets an error; the others continue."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        self._steps += 1
        self._outputs = []
        chunks, deferred = self._encode_images(chunks)
        prompt_tokens = sum(chunk.length for chunk in chunks if not chunk.sequence.is_decoding)
        began = time.perf_counter()
        for group, logits in self._run(chunks):
            self._advance(group, logits)
        self.scheduler.time.note_step(prompt_tokens, time.perf_counter() - began)
        attended = [image.digest for s in self.scheduler.running if s.attends_images for image in s.images]
        self.executor.execute(Trim(attended + deferred))
        return self._outputs

    def stats(self) -> Stats:
        cache = self.runner.encoder_cache
        return Stats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            blocks_used=self.pool.num_used,
            blocks_total=self.pool.num_blocks,
            prefix_queries=self.pool.queries,
            prefix_hits=self.pool.hits,
            encoder_queries=cache.queries,
            encoder_hits=cache.hits,
            preemptions=self.scheduler.preemptions,
            steps=self._steps,
            draft_tokens=self._drafted,
            accepted_tokens=self._accepted,
        )

    def _encode_images(self, chunks: list[Chunk]) -> tuple[list[Chunk], list[bytes]]:
        """Encode the images that the chunks need.

        Returns:
            The chunks that can run now, and the digests of images that wait for the next step, since encoding has taken
            the time that this one may take. Chunks whose images cannot be encoded are dropped.
        """
        cache, step_time = self.runner.encoder_cache, self.scheduler.time
        missing = {image.digest: image for chunk in chunks for image in chunk.images if image.digest not in cache}
        if not missing:
            return chunks, []
        # Images beyond the limit are encoded in the next step, which bounds the duration of this one. Those of one
        # chunk are always encoded together, since a small cache would drop the first before the last is encoded.
        needed = ({image.digest for image in chunk.images} & missing.keys() for chunk in chunks)
        first = next(len(digests) for digests in needed if digests)
        decoding = any(chunk.sequence.is_decoding for chunk in chunks)
        most = (step_time.images() if decoding else None) or ENCODE_PER_STEP
        some = list(missing.values())[: max(min(ENCODE_PER_STEP, most), first)]
        began = time.perf_counter()
        self._together_or_alone(
            some,
            lambda part: self.executor.execute(Encode([image for image in part if image.digest not in cache])),
            "encoding images",
        )
        seconds = time.perf_counter() - began
        step_time.note_images(len(some), seconds)
        late = decoding and step_time.leaves_no_time(seconds)
        failed = {image.digest for image in some if image.digest not in cache}
        kept: list[Chunk] = []
        deferred: list[bytes] = []
        for chunk in chunks:
            digests = {image.digest for image in chunk.images}
            if digests & failed:
                self._fail(chunk.sequence, "an image of this request could not be encoded")
            elif late and not chunk.sequence.is_decoding:
                deferred += digests
            elif all(digest in cache for digest in digests):
                kept.append(chunk)
        return kept, deferred

    def _run(self, chunks: list[Chunk]) -> list[tuple[list[Chunk], StepLogits]]:
        """Run all chunks together; if that fails, each alone, so that only the request at fault is lost.

        Running a chunk twice is harmless: it writes the same keys and values to the same positions.
        """
        if not chunks:
            return []
        done: list[tuple[list[Chunk], StepLogits]] = []
        for group, logits in self._together_or_alone(
            chunks, lambda part: self.executor.execute(Run([ChunkInput.of(chunk) for chunk in part])), "a step"
        ):
            if logits is None:
                self._fail(group[0].sequence, INTERNAL_ERROR)
            else:
                done.append((group, logits))
        self._lost_steps = 0 if done else self._lost_steps + 1
        if self._lost_steps >= MOST_LOST_STEPS:
            raise EngineError(f"{MOST_LOST_STEPS} steps in a row failed for every request")
        return done

    def _together_or_alone(
        self, items: list[T], work: Callable[[list[T]], R], what: str
    ) -> list[tuple[list[T], R | None]]:
        """Do the work for all items together; if that fails, for each alone, with None for those that fail again."""
        try:
            return [(items, work(items))]
        except Exception as error:
            self._reraise_if_fatal(error)
            logger.exception("%s failed for %d together; trying them one by one", what, len(items))
        results: list[tuple[list[T], R | None]] = []
        for item in items:
            try:
                results.append(([item], work([item])))
            except Exception as error:
                self._reraise_if_fatal(error)
                logger.exception("%s failed for one alone", what)
                results.append(([item], None))
        return results

    def _reraise_if_fatal(self, error: Exception) -> None:
        """Re-raise an error that leaves this process unusable, so that it ends and is restarted.

        After one failure of an accelerator everything fails in this process, and ranks that have executed
        different commands cannot continue.
        """
        if isinstance(error, torch.AcceleratorError) or not self.executor.isolates_failures:
            raise error

    def _advance(self, chunks: list[Chunk], logits: StepLogits) -> None:
        """Record what is computed, and sample. Drafted tokens are sampled one after the other while they are right."""
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.stop
            self.pool.register(chunk.sequence)
        for index, hidden in logits.prompts.items():
            self._note_prompt_logprobs(chunks[index], hidden)
        sampling = [chunk for chunk in chunks if chunk.samples]
        rows = accumulate((1 + len(chunk.drafts) for chunk in sampling), initial=0)
        pending = list(zip(sampling, rows, strict=False))
        number = 0
        while pending:
            picked = [row + number for _, row in pending]
            scores = logits.samples if len(picked) == len(logits.samples) else logits.samples[picked]
            sampled = self._sample_and_append([chunk.sequence for chunk, _ in pending], scores)
            pending = [
                place
                for place, token_id in zip(pending, sampled, strict=True)
                if self._continues(place[0], number, token_id)
            ]
            number += 1

    def _continues(self, chunk: Chunk, number: int, token_id: int) -> bool:
        """Whether draft `number` is the token that was sampled, so that the token after it can be sampled too."""
        sequence, drafts = chunk.sequence, chunk.drafts
        if not drafts:
            return False
        if number < len(drafts) and token_id == drafts[number] and not sequence.finished and sequence.num_computed:
            sequence.num_computed += 1
            self.pool.register(sequence)
            return True
        assert sequence.lookup is not None
        sequence.lookup.verified(len(drafts), number)
        self._drafted += len(drafts)
        self._accepted += number
        return False

    def _sample_and_append(self, sequences: list[Sequence], logits: torch.Tensor) -> list[int]:
        """Return the token of each sequence; below 0 for one that has failed."""
        if constrained := [(s.guide, s.sampling) for s in sequences if s.guide is not None]:
            assert self.guidance is not None
            self.guidance.constrain(*zip(*constrained, strict=True))
        sampled = self._sample(sequences, logits)
        for row, (sequence, (token_id, logprob)) in enumerate(zip(sequences, sampled, strict=True)):
            guide = sequence.guide
            if guide is not None and guide.reason is not None:
                self._fail(sequence, guide.reason, invalid=True)
            elif token_id >= 0:
                self._append(sequence, token_id, logprob)
            elif token_id == INVALID and sequence.sampling.edited and bool(logits[row].amax().isfinite()):
                self._fail(sequence, NO_TOKEN_LEFT, invalid=True)
            else:
                self.executor.execute(Scrub(self.pool.discard(sequence)))
                self._fail(sequence, NO_PROBABILITIES)
        return [token_id for token_id, _ in sampled]

    def _sample(self, sequences: list[Sequence], logits: torch.Tensor) -> list[tuple[int, Logprobs | None]]:
        """Sample all rows together; if that fails, each alone, with a token below INVALID for the sequence at fault."""
        results = self._together_or_alone(
            list(range(len(sequences))),
            lambda rows: self.sampler.sample(logits[rows[0] : rows[-1] + 1], [sequences[row].sampling for row in rows]),
            "sampling",
        )
        return [pair for _, sampled in results for pair in zip(*(sampled or ([INVALID - 1], [None])), strict=True)]

    def _append(self, sequence: Sequence, token_id: int, logprob: Logprobs | None) -> None:
        """Append a token to the completion.

        If the grammar then allows nothing but the end, the end-of-sequence token follows at once, without
        running the model (unless its log probability is requested).
        """
        guide = sequence.guide
        if guide is not None:
            guide.accept(token_id)
        was_long = sequence.is_long
        sequence.append(token_id)
        finish, stop_token = sequence.finish_reason()
        self._outputs.append(
            Output(
                sequence.request_id,
                [token_id],
                finish=finish,
                logprobs=None if logprob is None else [logprob],
                stop_token=stop_token,
                cached_tokens=sequence.cached_tokens,
                prompt_logprobs=sequence.prompt_logprobs if sequence.num_output_tokens == 1 else None,
                queued=sequence.queued,
            )
        )
        if finish is not None:
            self._drop(sequence)
        elif guide is not None and guide.ended and logprob is None:
            self._append(sequence, sequence.sampling.eos_token_ids[0], None)
        elif sequence.is_long and not was_long:
            self.scheduler.restart(sequence)

    def _note_prompt_logprobs(self, chunk: Chunk, hidden: torch.Tensor) -> None:
        """Record log probabilities of the prompt; recomputing after a preemption does not add any twice.

        The logits of position p belong to token p + 1. `hidden` is [chunk length, D].
        """
        sequence = chunk.sequence
        noted, count = sequence.prompt_logprobs, sequence.sampling.params.prompt_logprobs
        assert noted is not None
        assert count is not None
        first = max(chunk.start, len(noted))
        last = min(chunk.stop, sequence.num_prompt_tokens - 1)
        most = max(1, PROMPT_LOGITS // self.runner.vocab_size)
        for start in range(first, last, most):
            stop = min(start + most, last)
            with torch.inference_mode():
                logits = self.runner.model.logits(hidden[start - chunk.start : stop - chunk.start])
                noted += prompt_logprobs(logits, sequence.token_ids[start + 1 : stop + 1], count)

    def _fail(self, sequence: Sequence, message: str, *, invalid: bool = False) -> None:
        self._outputs += _failures([sequence.request_id], message, invalid=invalid)
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        self.scheduler.remove(sequence)


def _load_guidance(vocabulary: Vocabulary | None) -> Guidance | None:
    if vocabulary is None:
        return None
    try:
        return Guidance(vocabulary)
    except GrammarError as error:
        logger.warning("answers cannot be constrained: %s", error)
        return None


def _failures(request_ids: Iterable[int], message: str, *, invalid: bool = False) -> list[Output]:
    return [Output(id_, [], finish="error", error=message, invalid=invalid) for id_ in request_ids]
