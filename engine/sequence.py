"""One completion inside the engine: its tokens, how many of them are computed, and the blocks that hold them.

The pool of all blocks knows which are free, shared, or hold a known prefix.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Guides
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from engine.messages import Add, ImageInput, Logprobs
from engine.sampling_state import SamplingState

if TYPE_CHECKING:
    from engine.guidance import Guide
    from engine.prompt_lookup import PromptLookup


_ROOT = b"\0" * 16
_LONG_ROOT = b"\1" * 16


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one completion; what can be derived from it is a property.

    `num_computed` catches up with `num_tokens`: the keys and values of that many tokens are in the cache.
    There is no prefill or decode phase; a sequence with one token left to compute is decoding.

    Attributes:
        leader: The first completion of the same prompt. This one waits for its blocks instead of computing
            them as well.
        guide: Position of the completion in its grammar; None for free text. Like the tokens, it survives
            preemption.
        prefix_salt: See `engine.families.base.FamilyModel`.
        attends_images: See `engine.families.base.FamilyModel`.
        spans: See `engine.families.base.FamilyModel`.
        long_after: A sequence with more tokens `is_long`: the model uses other rotary frequencies for it, so
            all of its keys are computed again when it grows past this length. None where there is only one
            set of frequencies.
        positions: See `engine.families.preprocessor.Preprocessor.positions`.
        position_delta: See `engine.families.preprocessor.Preprocessor.positions`.
        lookup: Drafts the next tokens; None without speculative decoding.
        arrived: Time of arrival by `time.monotonic`.
        queued: Seconds from then to the first step that included it.
    """

    request_id: int
    token_ids: list[int]
    num_prompt_tokens: int
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
    prompt_logprobs_sent: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
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

        Raises:
            ValueError, OverflowError or TypeError: The sampling parameters are out of range.
        """
        longest = max_model_len - len(add.token_ids)
        wanted = add.params.max_tokens
        stop_token_ids, eos_token_ids = frozenset(add.params.stop_token_ids), frozenset(add.eos_token_ids)
        positions: Any = None if add.positions is None else add.positions.unpack()
        sequences: list[Sequence] = []
        for number, seed in enumerate(add.seeds):
            params = add.params if number == 0 else msgspec.structs.replace(add.params, prompt_logprobs=None)
            sequences.append(
                cls(
                    request_id=add.request_id + number,
                    token_ids=list(add.token_ids),
                    num_prompt_tokens=len(add.token_ids),
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
                    eos_token_ids=eos_token_ids,
                    leader=sequences[0] if sequences else None,
                    guide=guides[number] if guides else None,
                    prefix_salt=prefix_salt,
                    long_after=long_after,
                    attends_images=attends_images,
                    spans=list(spans),
                    positions=positions,
                    position_delta=add.position_delta,
                )
            )
        return sequences

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

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


class BlockPool:
    """Hands out blocks of `block_size` tokens with reference counts.

    A full block is registered under a hash of its whole prefix: the parent's hash, the token ids, and the
    digests of images inside, because all images share one placeholder id. When its last user releases it, it
    joins the free list but can be found until it is handed out again. The list is in order of release, so the
    block that was used longest ago is forgotten first.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.queries = 0
        self.hits = 0
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Return how many more blocks the sequence needs to hold its first `num_tokens` tokens."""
        return self.blocks_for(num_tokens) - len(sequence.block_table)

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the block table to hold `num_tokens` tokens.

        Returns:
            False if too few blocks are free; then nothing has changed.
        """
        missing = self.missing(sequence, num_tokens)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            sequence.block_table.append(self._take())
        return True

    def release(self, sequence: Sequence) -> None:
        """Release all blocks of the sequence; the last ones join the free list first, to be reused first."""
        for block in reversed(sequence.block_table):
            self._references[block] -= 1
            assert self._references[block] >= 0
            if self._references[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)
        sequence.block_table.clear()
        sequence.num_registered_blocks = 0

    def reuse_prefix(self, sequence: Sequence) -> int:
        """Give an empty sequence the longest cached prefix, and return its length in tokens.

        At least the last token is left to compute, because its logits are needed.
        """
        assert not sequence.block_table
        if not self.prefix_caching or sequence.prompt_logprobs is not None:
            return 0
        usable = (sequence.num_tokens - 1) // self.block_size
        found: list[int] = []
        for block_hash in self._hashes(sequence, usable):
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        for block in found:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1
        sequence.block_table.extend(found)
        sequence.num_registered_blocks = len(found)
        return len(found) * self.block_size

    def count(self, sequence: Sequence) -> None:
        """Count how many tokens an admitted sequence looked up, and how many were cached."""
        if self.prefix_caching:
            self.queries += sequence.num_tokens
            self.hits += sequence.num_computed

    def register(self, sequence: Sequence) -> None:
        """Make the full and computed blocks of the sequence findable."""
        full = sequence.num_computed // self.block_size
        if not self.prefix_caching or full <= sequence.num_registered_blocks:
            return
        hashes = self._hashes(sequence, full)
        for index in range(sequence.num_registered_blocks, full):
            block, block_hash = sequence.block_table[index], hashes[index]
            if self._hash_of[block] is None and block_hash not in self._block_of:
                self._hash_of[block] = block_hash
                self._block_of[block_hash] = block
        sequence.num_registered_blocks = full

    def discard(self, sequence: Sequence) -> list[int]:
        """Make the sequence's blocks impossible to find, and return those that only it holds."""
        for block in sequence.block_table:
            block_hash = self._hash_of[block]
            if block_hash is not None:
                del self._block_of[block_hash]
                self._hash_of[block] = None
        return [block for block in sequence.block_table if self._references[block] == 1]

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        old = self._hash_of[block]
        if old is not None:
            del self._block_of[old]
            self._hash_of[block] = None
        self._references[block] = 1
        return block

    def _hashes(self, sequence: Sequence, count: int) -> list[bytes]:
        """Return the chained hashes of the first `count` blocks; they are kept on the sequence."""
        hashes, size = sequence.block_hashes, self.block_size
        while len(hashes) < count:
            start = len(hashes) * size
            state = hashlib.blake2b(hashes[-1] if hashes else _root(sequence), digest_size=16)
            state.update(array("q", sequence.token_ids[start : start + size]).tobytes())
            for part in _image_marks(sequence, start, start + size):
                state.update(part)
            hashes.append(state.digest())
        return hashes[:count]


def _root(sequence: Sequence) -> bytes:
    return (_LONG_ROOT if sequence.is_long else _ROOT) + sequence.prefix_salt


def _image_marks(sequence: Sequence, start: int, stop: int) -> Iterable[bytes]:
    for image in sequence.images_within(start, stop):
        yield image.digest
        yield (image.offset - start).to_bytes(8, "little", signed=True)
