"""The block pool under random use: nothing is lost, nothing is shared wrongly, what is found is right."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_pool import BlockPool
from engine.messages import Add, ImageInput
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

SIZE = 4


def sequence(token_ids: list[int], images: list[ImageInput] | None = None) -> Sequence:
    add = Add(0, token_ids, SamplingParams(), [0], (), images or [])
    return Sequence.from_message(add, max_model_len=1000, order=0)[0]


def compute(pool: BlockPool, seq: Sequence) -> None:
    assert pool.allocate(seq, seq.num_tokens)
    seq.num_computed = seq.num_tokens
    pool.register(seq)


def test_a_prefix_is_found_up_to_the_last_full_block_before_the_newest_token() -> None:
    pool = BlockPool(16, SIZE)
    first = sequence(list(range(12)))
    compute(pool, first)
    pool.release(first)
    again = sequence(list(range(12)))
    assert pool.reuse_prefix(again) == 8, "the last token's logits are needed, so its block is computed anew"
    longer = sequence(list(range(13)))
    assert pool.reuse_prefix(longer) == 12
    other = sequence([0, 1, 2, 3, 9, 9, 9, 9, 9])
    assert pool.reuse_prefix(other) == 4


def test_images_with_the_same_placeholders_are_told_apart() -> None:
    pool = BlockPool(16, SIZE)
    tokens = [1, 7, 7, 7, 7, 2, 3, 4, 5]
    first = sequence(tokens, [ImageInput(b"one", 1, 4, {})])
    compute(pool, first)
    assert pool.reuse_prefix(sequence(tokens, [ImageInput(b"two", 1, 4, {})])) == 0
    assert pool.reuse_prefix(sequence(tokens, [ImageInput(b"one", 1, 4, {})])) == 8
    assert pool.reuse_prefix(sequence(tokens)) == 0


def test_what_was_used_longest_ago_is_forgotten_first() -> None:
    pool = BlockPool(4, SIZE)
    for start in (0, 100):
        seq = sequence([start + i for i in range(8)])
        compute(pool, seq)
        pool.release(seq)
    new = sequence([500 + i for i in range(4)])
    compute(pool, new)
    assert pool.reuse_prefix(sequence([*range(8), 1])) in (0, 4)
    assert pool.reuse_prefix(sequence([*range(100, 108), 1])) == 8


def test_discarded_blocks_are_never_found_and_shared_ones_are_not_handed_out() -> None:
    pool = BlockPool(16, SIZE)
    first = sequence(list(range(9)))
    compute(pool, first)
    second = sequence([*range(8), 50, 51, 52, 53, 54])
    assert pool.reuse_prefix(second) == 8
    compute(pool, second)
    own = pool.discard(second)
    assert set(own).isdisjoint(first.block_table)
    assert set(own) == set(second.block_table[2:])
    pool.release(second)
    assert pool.reuse_prefix(sequence([*range(8), 50, 51, 52, 53, 54])) == 0
    assert pool.num_used == len(first.block_table)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_sequence_of_uses_keeps_the_books(data: st.DataObject) -> None:
    pool = BlockPool(data.draw(st.integers(4, 24)), SIZE)
    live: list[Sequence] = []
    contents: dict[int, tuple[int, ...]] = {}
    for _ in range(data.draw(st.integers(1, 40))):
        if live and data.draw(st.booleans()):
            seq = live.pop(data.draw(st.integers(0, len(live) - 1)))
            pool.release(seq)
            assert not seq.block_table
            continue
        length = data.draw(st.integers(1, 30))
        tokens = [data.draw(st.integers(0, 1)) for _ in range(length)]
        seq = sequence(tokens)
        reused = pool.reuse_prefix(seq)
        for index, block in enumerate(seq.block_table):
            assert contents[block] == tuple(tokens[: (index + 1) * SIZE]), "a block was found for another prefix"
        before = pool.num_free
        if not pool.allocate(seq, length):
            assert pool.missing(seq, length) > before
            pool.release(seq)
            continue
        for index in range(reused // SIZE, len(seq.block_table)):
            contents[seq.block_table[index]] = tuple(tokens[: (index + 1) * SIZE])
        seq.num_computed = length
        pool.register(seq)
        live.append(seq)
        used = {block for s in live for block in s.block_table}
        assert pool.num_used == len(used)
        assert pool.num_free + len(used) == pool.num_blocks
    for seq in live:
        pool.release(seq)
    assert pool.num_used == 0
