"""The engine: requests in, one step at a time, tokens out."""

from __future__ import annotations

import logging

import torch

from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.executor import Executor, LocalExecutor, ParallelExecutor, load_runner
from engine.messages import Add, FinishReason, Output, Picture, Stats
from engine.runner import StepLogits
from engine.sampler import Sampler, prompt_logprobs
from engine.scheduler import Chunk, Scheduler
from engine.sequence import Sequence
from engine.step_input import ChunkInput

logger = logging.getLogger(__name__)

INTERNAL_ERROR = "the engine failed on this request"


class Engine:
    """Add requests, call `step` while `has_work`; each step gives the outputs of all requests that got a token."""

    def __init__(self, config: EngineConfig, executor: Executor) -> None:
        self.executor = executor
        self.runner = runner = executor.runner
        budget = config.max_num_batched_tokens or (512 if runner.device.type == "cpu" else 8192)
        self.pool = BlockPool(
            runner.num_blocks, runner.block_size, prefix_caching=config.enable_prefix_caching
        )
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max(budget, config.max_num_seqs),
        )
        self.sampler = Sampler(runner.vocab_size, runner.device)
        self._sequences: dict[int, Sequence] = {}
        self._arrivals = 0
        self._steps = 0

    @classmethod
    def load(cls, config: EngineConfig) -> Engine:
        """Load the model on all of `config.devices`. Raises ModelLoadError."""
        if config.tensor_parallel_degree > 1:
            return cls(config, ParallelExecutor(config))
        return cls(config, LocalExecutor(load_runner(config)))

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, add: Add) -> Output | None:
        """Queue a request. An output is returned for one that is refused at once."""
        longest = self.runner.max_model_len
        if not 0 < len(add.token_ids) < longest:
            return _refusal(
                add.request_id, f"the prompt has {len(add.token_ids)} tokens; allowed: 1 to {longest - 1}"
            )
        if any(not 0 <= token < self.runner.vocab_size for token in add.token_ids) and not add.pictures:
            return _refusal(add.request_id, "the prompt holds a token id outside the vocabulary")
        self._arrivals += 1
        sequence = Sequence.from_message(add, max_model_len=longest, order=self._arrivals)
        self._sequences[add.request_id] = sequence
        for picture in sequence.pictures:
            self.runner.encoder_cache.count(hit=picture.digest in self.runner.encoder_cache)
        self.scheduler.add(sequence)
        return None

    def abort(self, request_id: int) -> None:
        """Forget the request; unknown ids (finished a moment ago) are fine."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self.scheduler.remove(sequence)

    def step(self) -> list[Output]:
        """Run the model once. A request that makes it fail is answered with an error; the others go on."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        self._steps += 1
        outputs: list[Output] = []
        chunks = self._encode_pictures(chunks, outputs)
        for group, logits in self._run(chunks, outputs):
            self._advance(group, logits, outputs)
        self.executor.trim()
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
        )

    def _encode_pictures(self, chunks: list[Chunk], outputs: list[Output]) -> list[Chunk]:
        """Make sure that every picture the chunks touch is encoded; drop the chunks of those that cannot be."""
        cache = self.runner.encoder_cache
        missing: dict[bytes, Picture] = {}
        for chunk in chunks:
            for picture in chunk.sequence.pictures_within(chunk.start, chunk.stop):
                if picture.digest not in cache:
                    missing[picture.digest] = picture
        if not missing:
            return chunks
        try:
            self.executor.encode(list(missing.values()))
        except Exception:
            if not self.executor.isolates_failures:
                raise
            logger.exception("encoding %d pictures together failed; encoding them one by one", len(missing))
            for picture in missing.values():
                self._encode_alone(picture)
        kept = []
        for chunk in chunks:
            pictures = chunk.sequence.pictures_within(chunk.start, chunk.stop)
            if all(picture.digest in cache for picture in pictures):
                kept.append(chunk)
            else:
                self._fail(chunk.sequence, "a picture of this request could not be encoded", outputs)
        return kept

    def _encode_alone(self, picture: Picture) -> None:
        if picture.digest in self.runner.encoder_cache:
            return
        try:
            self.executor.encode([picture])
        except Exception:
            logger.exception("a picture could not be encoded")

    def _run(self, chunks: list[Chunk], outputs: list[Output]) -> list[tuple[list[Chunk], StepLogits]]:
        """All chunks together; where that fails, each alone, so that only the culprit's request is lost.

        Running a chunk twice is harmless: it writes the same keys and values to the same places.
        """
        if not chunks:
            return []
        try:
            return [(chunks, self.executor.run([ChunkInput.of(chunk) for chunk in chunks]))]
        except Exception:
            if not self.executor.isolates_failures:
                raise
            logger.exception("a step of %d requests failed; running them one by one", len(chunks))
        done: list[tuple[list[Chunk], StepLogits]] = []
        for chunk in chunks:
            try:
                done.append(([chunk], self.executor.run([ChunkInput.of(chunk)])))
            except Exception:
                logger.exception("the step failed with this request alone")
                self._fail(chunk.sequence, INTERNAL_ERROR, outputs)
        return done

    def _advance(self, chunks: list[Chunk], logits: StepLogits, outputs: list[Output]) -> None:
        """Sample, and note what is computed."""
        for index, rows in logits.prompts.items():
            _note_prompt_logprobs(chunks[index], rows)
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.stop
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        for chunk in chunks:
            self.pool.register(chunk.sequence)
        if not sampling:
            return
        token_ids, logprobs = self.sampler.sample(logits.samples, [s.sampling for s in sampling])
        for sequence, token_id, logprob in zip(sampling, token_ids, logprobs, strict=True):
            if token_id < 0:
                self.executor.scrub(self.pool.discard(sequence))
                self._fail(sequence, "the model gave no usable probabilities (NaN) for this request", outputs)
                continue
            sequence.append(token_id)
            finish, stop_token = _finish(sequence, token_id)
            output = Output(
                sequence.request_id,
                [token_id],
                finish=finish,
                logprobs=None if logprob is None else [logprob],
                stop_token=stop_token,
                cached_tokens=sequence.cached_tokens,
            )
            if sequence.prompt_logprobs is not None and not sequence.prompt_logprobs_sent:
                output.prompt_logprobs = sequence.prompt_logprobs
                sequence.prompt_logprobs_sent = True
            outputs.append(output)
            if finish is not None:
                self._drop(sequence)

    def _fail(self, sequence: Sequence, message: str, outputs: list[Output]) -> None:
        outputs.append(Output(sequence.request_id, [], finish="error", error=message))
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        self.scheduler.remove(sequence)


def _finish(sequence: Sequence, token_id: int) -> tuple[FinishReason | None, int | None]:
    """Whether the newest token ends the answer: (reason, the stop id that did it)."""
    params = sequence.sampling.params
    if sequence.num_output_tokens >= params.min_tokens:
        if not params.ignore_eos and token_id in sequence.sampling.eos_token_ids:
            return "stop", None
        if token_id in params.stop_token_ids:
            return "stop", token_id
    if sequence.num_output_tokens >= sequence.max_tokens:
        return "length", None
    return None, None


def _note_prompt_logprobs(chunk: Chunk, rows: torch.Tensor) -> None:
    """Position p's logits tell of token p + 1; recomputing after a preemption must not add any twice."""
    sequence = chunk.sequence
    assert sequence.prompt_logprobs is not None
    count = sequence.sampling.params.prompt_logprobs
    assert count is not None
    first = max(chunk.start, len(sequence.prompt_logprobs))
    last = min(chunk.stop, sequence.num_prompt_tokens - 1)
    if first < last:
        targets = sequence.token_ids[first + 1 : last + 1]
        sequence.prompt_logprobs += prompt_logprobs(
            rows[first - chunk.start : last - chunk.start], targets, count
        )


def _refusal(request_id: int, message: str) -> Output:
    return Output(request_id, [], finish="error", error=message)
