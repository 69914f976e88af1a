"""The key/value cache's blocks: which are free, who uses the others, and which hold a prompt's prefix."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable

from engine.sequence import Sequence

_ROOT = b"\0" * 16
_LONG_ROOT = b"\1" * 16


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
