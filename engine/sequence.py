"""One completion inside the engine: its tokens, how many of them are computed, and the blocks that hold them."""

from __future__ import annotations

import time
from collections.abc import Sequence as Guides
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from engine.config import LookupConfig
from engine.messages import Add, FinishReason, ImageInput, Logprobs
from engine.prompt_lookup import PromptLookup
from engine.sampling_state import SamplingState

if TYPE_CHECKING:
    from engine.guidance import Guide


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one completion; what can be derived from it is a property.

    `num_computed` catches up with `num_tokens`: the keys and values of that many tokens are in the cache. There is no
    prefill or decode phase; a sequence with one token left to compute is decoding.

    Attributes:
        leader: The first completion of the same prompt. This one waits for its blocks instead of computing them as
            well.
        guide: Position of the completion in its grammar; None for free text. Like the tokens, it survives preemption.
        prefix_salt: See `engine.families.base.FamilyModel`.
        attends_images: See `engine.families.base.FamilyModel`.
        spans: See `engine.families.base.FamilyModel`.
        long_after: A sequence with more tokens `is_long`: the model uses other rotary frequencies for it, so all of its
            keys are computed again when it grows past this length. None where there is only one set of frequencies.
        positions: See `engine.families.preprocessor.Preprocessor.positions`.
        position_delta: See `engine.families.preprocessor.Preprocessor.positions`.
        lookup: Drafts the next tokens; None without speculative decoding.
        arrived: Time of arrival by `time.monotonic`.
        queued: Seconds from then to the first step that included it.
    """

    request_id: int
    token_ids: list[int]
    images: list[ImageInput]
    sampling: SamplingState
    max_tokens: int
    priority: int = 0
    order: int = 0
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered_blocks: int = 0
    cached_tokens: int = -1
    prompt_logprobs: list[Logprobs] | None = None
    stop_token_ids: frozenset[int] = frozenset()
    leader: Sequence | None = None
    guide: Guide | None = None
    prefix_salt: bytes = b""
    attends_images: bool = False
    spans: list[tuple[int, int]] = field(default_factory=list)
    long_after: int | None = None
    positions: npt.NDArray[np.int64] | None = None
    position_delta: int = 0
    lookup: PromptLookup | None = None
    finished: bool = False
    arrived: float = field(default_factory=time.monotonic)
    queued: float = 0.0

    @classmethod
    def from_message(
        cls,
        add: Add,
        *,
        max_model_len: int,
        order: int,
        guides: Guides[Guide] = (),
        prefix_salt: bytes = b"",
        attends_images: bool = False,
        spans: Guides[tuple[int, int]] = (),
        long_after: int | None = None,
        lookup: LookupConfig | None = None,
    ) -> list[Sequence]:
        """Create one sequence for each completion of a request.

        Args:
            add: The request.
            max_model_len: Greatest number of tokens of a sequence.
            order: Order of arrival of the first completion.
            guides: One for each completion, if the request has a grammar.
            prefix_salt: See `Sequence`.
            attends_images: See `Sequence`.
            spans: See `Sequence`.
            long_after: See `Sequence`.
            lookup: Settings of speculative decoding; None without it.

        Raises:
            ValueError, OverflowError or TypeError: The sampling parameters are out of range.
        """
        longest = max_model_len - len(add.token_ids)
        wanted = add.params.max_tokens
        stop_token_ids = frozenset(add.params.stop_token_ids)
        positions: Any = None if add.positions is None else add.positions.unpack()
        sequences: list[Sequence] = []
        for number, seed in enumerate(add.seeds):
            params = add.params if number == 0 else msgspec.structs.replace(add.params, prompt_logprobs=None)
            sequences.append(
                cls(
                    request_id=add.request_id + number,
                    token_ids=list(add.token_ids),
                    images=add.images,
                    sampling=SamplingState(
                        params=params,
                        prompt_token_ids=add.token_ids,
                        output_token_ids=[],
                        eos_token_ids=add.eos_token_ids,
                        seed=seed,
                        constrained=bool(guides),
                    ),
                    max_tokens=longest if wanted is None else min(wanted, longest),
                    priority=add.priority,
                    order=order + number,
                    prompt_logprobs=[] if params.prompt_logprobs is not None else None,
                    stop_token_ids=stop_token_ids,
                    leader=sequences[0] if sequences else None,
                    guide=guides[number] if guides else None,
                    prefix_salt=prefix_salt,
                    long_after=long_after,
                    attends_images=attends_images,
                    spans=list(spans),
                    positions=positions,
                    position_delta=add.position_delta,
                    lookup=None if lookup is None else PromptLookup(lookup),
                )
            )
        return sequences

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.sampling.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.sampling.output_token_ids)

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest token is not in the cache yet."""
        return self.num_output_tokens > 0 and self.num_uncomputed == 1

    @property
    def is_long(self) -> bool:
        return self.long_after is not None and self.num_tokens > self.long_after

    @property
    def waits_for_leader(self) -> bool:
        """Whether the prompt is being computed for another completion, and can soon be shared."""
        leader = self.leader
        return leader is not None and not leader.finished and leader.num_computed < leader.num_prompt_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """Order of service: lower priority values first, then earlier arrivals."""
        return (self.priority, self.order)

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.sampling.output_token_ids.append(token_id)

    def finish_reason(self) -> tuple[FinishReason | None, int | None]:
        """Return why the newest token ends the completion, and the stop token that caused it; None if it continues.

        A completion whose grammar allows only the end is complete, even if end-of-sequence must not follow it.
        """
        params, token_id, count = self.sampling.params, self.token_ids[-1], self.num_output_tokens
        if count >= params.min_tokens:
            if not params.ignore_eos and token_id in self.sampling.eos_token_ids:
                return "stop", None
            if token_id in self.stop_token_ids:
                return "stop", token_id
        if self.guide is not None and self.guide.ended:
            no_end = params.ignore_eos or self.sampling.too_short or not self.sampling.eos_token_ids
            if no_end or count >= self.max_tokens:
                return "stop", None
        return ("length" if count >= self.max_tokens else None), None

    def uncut(self, start: int, stop: int) -> int:
        """Return the last position up to `stop` where a chunk from `start` may end: not inside a span."""
        for first, last in self.spans:
            if first < stop < last:
                return max(start, first)
        return stop

    def span_end(self, start: int) -> int:
        """Return the end of the span that contains `start`."""
        return next(last for first, last in self.spans if first <= start < last)

    def spans_within(self, start: int, stop: int) -> list[tuple[int, int]]:
        return [span for span in self.spans if span[0] < stop and span[1] > start]

    def positions_within(self, start: int, stop: int) -> npt.NDArray[np.int64] | None:
        """Return the positions [axes, stop - start], if the prompt has a table of positions that contains `start`.

        Otherwise None: the position of each token is its index plus `position_delta`.
        """
        if self.positions is None or start >= self.positions.shape[1]:
            return None
        known = self.positions[:, start:stop]
        behind = np.arange(start + known.shape[1], stop) + self.position_delta
        return np.concatenate([known, np.broadcast_to(behind, (len(known), len(behind)))], axis=1)

    def images_for(self, start: int, stop: int) -> list[ImageInput]:
        """Return the images whose encoder outputs are needed to compute the tokens [start, stop)."""
        return self.images if self.attends_images else self.images_within(start, stop)

    def images_within(self, start: int, stop: int) -> list[ImageInput]:
        """Return the images that have a token in [start, stop)."""
        return [p for p in self.images if p.offset < stop and p.end > start]
