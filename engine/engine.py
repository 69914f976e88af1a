"""The engine: requests in, one step at a time, tokens out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from engine.config import EngineConfig, Vocabulary
from engine.errors import NO_TOKEN_LEFT, EngineError, ModelLoadError
from engine.executor import Executor
from engine.guidance import Built, GrammarError, Guidance, Guide
from engine.messages import Add, FinishReason, ImageInput, Logprobs, Output, Stats
from engine.prompt_lookup import PromptLookup
from engine.runner import StepLogits
from engine.sampler import INVALID, Sampler, prompt_logprobs
from engine.sampling_params import SamplingParams
from engine.scheduler import Chunk, ChunkInput, Encode, Run, Scheduler, Scrub, Trim
from engine.sequence import BlockPool, Sequence

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)

INTERNAL_ERROR = "the engine failed on this request"

ENCODE_PER_STEP = 32
"""Greatest number of images that a step encodes."""

PROMPT_LOGITS = 1 << 24
"""Greatest number of logits that are computed at a time for the log probabilities of prompts."""

MOST_LOST_STEPS = 8
"""Number of consecutive steps that fail for every request, each alone, before the process is considered
broken."""

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
        longest, count = self.runner.max_model_len, len(add.token_ids)
        if not 0 < count < longest:
            return _refusal(add, f"the prompt has {count} tokens; allowed: 1 to {longest - 1}")
        if min(add.token_ids) < 0 or (not add.images and max(add.token_ids) >= self.runner.vocab_size):
            return _refusal(add, "the prompt holds a token id outside the vocabulary")
        slots = self.runner.image_slots
        if slots is not None and (images := len({image.digest for image in add.images})) > slots:
            reason = f"the request has {images} different images; this server's memory holds {slots} at a time"
            return [_invalid(request_id, reason) for request_id in add.choice_ids]
        try:
            sequences = Sequence.from_message(
                add,
                max_model_len=longest,
                order=self._arrivals,
                guides=guides or (),
                prefix_salt=self.runner.model.prefix_salt(add.token_ids, add.images),
                long_after=None if (rope := self.runner.model.long_rope) is None else rope.limit,
                attends_images=self.runner.model.attends_images,
                spans=self.runner.model.spans(add.token_ids, add.images),
            )
        except (ValueError, OverflowError, TypeError):
            logger.exception("a request's parameters cannot be used")
            return _refusal(add, "the sampling parameters are out of range")
        self._arrivals += len(sequences)
        for image in add.images:
            self.runner.encoder_cache.count(hit=image.digest in self.runner.encoder_cache)
        for sequence in sequences:
            sequence.lookup = None if self._lookup is None else PromptLookup(self._lookup)
            self._sequences[sequence.request_id] = sequence
            self.scheduler.add(sequence)
        return []

    def add_built(self, built: Built) -> list[Output]:
        """Add a request whose grammar has been compiled, or refuse it if that failed."""
        wanted = [request_id for request_id in built.add.choice_ids if request_id not in built.aborted]
        if built.reason is not None:
            return [_invalid(request_id, built.reason) for request_id in wanted]
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
        outputs: list[Output] = []
        chunks, deferred = self._encode_images(chunks, outputs)
        began, prompt_tokens = (
            time.perf_counter(),
            sum(c.length for c in chunks if not c.sequence.is_decoding),
        )
        for group, logits in self._run(chunks, outputs):
            self._advance(group, logits, outputs)
        self.scheduler.time.note_step(prompt_tokens, time.perf_counter() - began)
        attending = (s for s in self.scheduler.running if s.attends_images)
        self.executor.execute(Trim([image.digest for s in attending for image in s.images] + deferred))
        return outputs

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

    def _encode_images(self, chunks: list[Chunk], outputs: list[Output]) -> tuple[list[Chunk], list[bytes]]:
        """Encode the images that the chunks touch.

        Returns:
            The chunks that can run now, and the digests of images that wait for the next step, since encoding has taken
            the time that this one may take. Chunks whose images cannot be encoded are dropped.
        """
        cache = self.runner.encoder_cache
        missing: dict[bytes, ImageInput] = {}
        for chunk in chunks:
            for image in chunk.sequence.images_for(chunk.start, chunk.stop):
                if image.digest not in cache:
                    missing[image.digest] = image
        if not missing:
            return chunks, []
        # Images beyond the limit are encoded in the next step, which bounds the duration of this one. Those of one
        # chunk are always encoded together, since a small cache would drop the first before the last is encoded.
        first = next(count for chunk in chunks if (count := self._count_missing(chunk)))
        decoding = any(chunk.sequence.is_decoding for chunk in chunks)
        most = self.scheduler.time.images() if decoding else None
        some = list(missing.values())[: max(min(ENCODE_PER_STEP, most or ENCODE_PER_STEP), first)]
        began = time.perf_counter()
        self._together_or_alone(
            some,
            lambda part: self.executor.execute(Encode([p for p in part if p.digest not in cache])),
            "encoding images",
        )
        seconds = time.perf_counter() - began
        self.scheduler.time.note_images(len(some), seconds)
        late = decoding and self.scheduler.time.leaves_no_time(seconds)
        failed = {image.digest for image in some if image.digest not in cache}
        kept: list[Chunk] = []
        deferred: list[bytes] = []
        for chunk in chunks:
            digests = {p.digest for p in chunk.sequence.images_for(chunk.start, chunk.stop)}
            if digests & failed:
                self._fail(chunk.sequence, "an image of this request could not be encoded", outputs)
            elif late and not chunk.sequence.is_decoding:
                deferred += digests
            elif all(digest in cache for digest in digests):
                kept.append(chunk)
        return kept, deferred

    def _count_missing(self, chunk: Chunk) -> int:
        """Count the chunk's distinct images that are not encoded."""
        images = chunk.sequence.images_for(chunk.start, chunk.stop)
        return len({p.digest for p in images if p.digest not in self.runner.encoder_cache})

    def _run(self, chunks: list[Chunk], outputs: list[Output]) -> list[tuple[list[Chunk], StepLogits]]:
        """Run all chunks together; if that fails, each alone, so that only the request at fault is lost.

        Running a chunk twice is harmless: it writes the same keys and values to the same positions.
        """
        if not chunks:
            return []
        groups = self._together_or_alone(
            chunks,
            lambda part: self.executor.execute(Run([ChunkInput.of(chunk) for chunk in part])),
            "a step",
        )
        for group, logits in groups:
            if logits is None:
                self._fail(group[0].sequence, INTERNAL_ERROR, outputs)
        done = [(group, logits) for group, logits in groups if logits is not None]
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

    def _advance(self, chunks: list[Chunk], logits: StepLogits, outputs: list[Output]) -> None:
        """Record what is computed, and sample."""
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.stop
            self.pool.register(chunk.sequence)
        for index, hidden in logits.prompts.items():
            self._note_prompt_logprobs(chunks[index], hidden)
        rows = 0
        pending: list[tuple[Chunk, int]] = []
        for chunk in chunks:
            if chunk.samples:
                pending.append((chunk, rows))
                rows += 1 + len(chunk.drafts)
        for number in range(1 + max((len(chunk.drafts) for chunk, _ in pending), default=0)):
            if not pending:
                break
            picked = [row + number for _, row in pending]
            scores = logits.samples if len(picked) == len(logits.samples) else logits.samples[picked]
            sampled = self._sample_and_append([chunk.sequence for chunk, _ in pending], scores, outputs)
            pending = [
                place
                for place, token_id in zip(pending, sampled, strict=True)
                if self._continues(place[0], number, token_id)
            ]

    def _continues(self, chunk: Chunk, number: int, token_id: int) -> bool:
        """Whether the next token of the sequence can be sampled too: the last one is the one that was drafted."""
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

    def _sample_and_append(self, sequences: list[Sequence], logits: torch.Tensor, outputs: list[Output]) -> list[int]:
        """Return the token of each sequence; below 0 for one that has failed."""
        self._constrain(sequences)
        sampled = self._sample(sequences, logits)
        for row, (sequence, token_id, logprob) in enumerate(sampled):
            guide = sequence.guide
            if guide is not None and guide.reason is not None:
                outputs.append(_invalid(sequence.request_id, guide.reason))
                self._drop(sequence)
            elif token_id >= 0:
                self._append(sequence, token_id, logprob, outputs)
            elif token_id == INVALID and sequence.sampling.edited and bool(logits[row].amax().isfinite()):
                outputs.append(_invalid(sequence.request_id, NO_TOKEN_LEFT))
                self._drop(sequence)
            else:
                self.executor.execute(Scrub(self.pool.discard(sequence)))
                self._fail(sequence, "the model gave no usable probabilities for this request", outputs)
        return [token_id for _, token_id, _ in sampled]

    def _append(self, sequence: Sequence, token_id: int, logprob: Logprobs | None, outputs: list[Output]) -> None:
        """Append a token to the completion.

        If the grammar then allows nothing but the end, the end-of-sequence token follows at once, without
        running the model (unless its log probability is requested).
        """
        guide = sequence.guide
        if guide is not None:
            guide.accept(token_id)
        was_long = sequence.is_long
        sequence.append(token_id)
        finish, stop_token = _finish(sequence, token_id)
        output = Output(
            sequence.request_id,
            [token_id],
            finish=finish,
            logprobs=None if logprob is None else [logprob],
            stop_token=stop_token,
            cached_tokens=sequence.cached_tokens,
            queued=sequence.queued,
        )
        if sequence.prompt_logprobs is not None and not sequence.prompt_logprobs_sent:
            output.prompt_logprobs = sequence.prompt_logprobs
            sequence.prompt_logprobs_sent = True
        outputs.append(output)
        if finish is not None:
            self._drop(sequence)
        elif guide is not None and guide.ended and logprob is None:
            self._append(sequence, sequence.sampling.eos_token_ids[0], None, outputs)
        elif sequence.is_long and not was_long:
            self.scheduler.restart(sequence)

    def _constrain(self, sequences: list[Sequence]) -> None:
        """Set what the sampler may choose from, for all sequences that have a grammar."""
        constrained = [(s.guide, s.sampling) for s in sequences if s.guide is not None]
        if not constrained:
            return
        assert self.guidance is not None
        guides, states = zip(*constrained, strict=True)
        try:
            self.guidance.constrain(guides, states)
        except BaseException as error:  # a panic in Rust is not an Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            logger.exception("what the grammars of %d answers allow could not be computed", len(guides))
            for guide in guides:
                guide.reason = guide.reason or "what the grammar allows could not be computed"

    def _sample(self, sequences: list[Sequence], logits: torch.Tensor) -> list[tuple[Sequence, int, Logprobs | None]]:
        """Sample all rows together; if that fails, each alone, with a token below INVALID for the sequence at fault."""
        chosen: list[tuple[Sequence, int, Logprobs | None]] = []
        for rows, result in self._together_or_alone(
            list(range(len(sequences))),
            lambda rows: self.sampler.sample(logits[rows[0] : rows[-1] + 1], [sequences[row].sampling for row in rows]),
            "sampling",
        ):
            token_ids, logprobs = result or ([INVALID - 1], [None])
            chosen += zip([sequences[row] for row in rows], token_ids, logprobs, strict=True)
        return chosen

    def _note_prompt_logprobs(self, chunk: Chunk, hidden: torch.Tensor) -> None:
        """Record log probabilities of the prompt; recomputing after a preemption does not add any twice.

        The logits of position p belong to token p + 1. `hidden` is [chunk length, D]. An image's placeholder
        may lie outside the vocabulary; its probability is 0.
        """
        sequence = chunk.sequence
        noted, count = sequence.prompt_logprobs, sequence.sampling.params.prompt_logprobs
        assert noted is not None
        assert count is not None
        first = max(chunk.start, len(noted))
        last = min(chunk.stop, sequence.num_prompt_tokens - 1)
        vocabulary = self.runner.vocab_size
        most = max(1, PROMPT_LOGITS // vocabulary)
        for start in range(first, last, most):
            stop = min(start + most, last)
            targets = sequence.token_ids[start + 1 : stop + 1]
            with torch.inference_mode():
                logits = self.runner.model.logits(hidden[start - chunk.start : stop - chunk.start])
                entries = prompt_logprobs(logits, [min(t, vocabulary - 1) for t in targets], count)
            for target, entry in zip(targets, entries, strict=True):
                if target >= vocabulary:
                    entry.token_ids[0], entry.logprobs[0], entry.ranks[0] = target, -math.inf, vocabulary
            noted += entries

    def _fail(self, sequence: Sequence, message: str, outputs: list[Output]) -> None:
        outputs.append(Output(sequence.request_id, [], finish="error", error=message))
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


def _finish(sequence: Sequence, token_id: int) -> tuple[FinishReason | None, int | None]:
    """Return why the newest token ends the completion, and the stop token that caused it.

    A completion whose grammar allows nothing but the end is whole, even if end-of-sequence must not follow
    it.
    """
    params = sequence.sampling.params
    if sequence.num_output_tokens >= params.min_tokens:
        if not params.ignore_eos and token_id in sequence.eos_token_ids:
            return "stop", None
        if token_id in sequence.stop_token_ids:
            return "stop", token_id
    if sequence.guide is not None and sequence.guide.ended:
        at_limit = sequence.num_output_tokens >= sequence.max_tokens
        if at_limit or params.ignore_eos or sequence.sampling.too_short or not sequence.eos_token_ids:
            return "stop", None
    if sequence.num_output_tokens >= sequence.max_tokens:
        return "length", None
    return None, None


def _invalid(request_id: int, reason: str) -> Output:
    return Output(request_id, [], finish="error", error=reason, invalid=True)


def _refusal(add: Add, message: str) -> list[Output]:
    return [Output(request_id, [], finish="error", error=message) for request_id in add.choice_ids]
