"""Text as it arrives: whole characters, stop strings across any cut, nothing lost and nothing twice."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from handlers.prompts.tokenizer import Detokenizer
from tests.support.models import make_tokenizer
from tests.support.pace import too_long

TOKENIZER = make_tokenizer().backend_tokenizer


def ids(text: str) -> list[int]:
    """One token per byte: the hardest cut there is."""
    encoded: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return encoded


def feed(detokenizer: Detokenizer, token_ids: list[int]) -> list[str]:
    pieces = [detokenizer.push(token) for token in token_ids]
    if detokenizer.stopped_by is None:
        pieces.append(detokenizer.finish())
    return pieces


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40).filter(lambda t: "<" not in t))
def test_any_text_comes_out_whole(text: str) -> None:
    pieces = feed(Detokenizer(TOKENIZER), ids(text))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="abé🙂", max_size=24),
    st.lists(st.text(alphabet="abé🙂", min_size=1, max_size=4), max_size=3),
)
def test_the_answer_ends_before_the_stop_string_that_is_complete_first(text: str, stops: list[str]) -> None:
    detokenizer = Detokenizer(TOKENIZER, stop=stops)
    got = "".join(feed(detokenizer, ids(text)))
    ends = [(text.find(stop) + len(stop), i, text.find(stop)) for i, stop in enumerate(stops) if stop in text]
    assert got == (text[: min(ends)[2]] if ends else text)
    assert (detokenizer.stopped_by is not None) == bool(ends)


def test_text_that_may_be_a_stop_string_is_held_back_until_it_is_decided() -> None:
    detokenizer = Detokenizer(TOKENIZER, stop=["stop!"])
    assert "".join(detokenizer.push(token) for token in ids("go sto")) == "go "
    assert "".join(detokenizer.push(token) for token in ids("re")) == "store"


def test_the_stop_string_can_be_kept() -> None:
    detokenizer = Detokenizer(TOKENIZER, stop=["END"], include_stop=True)
    assert "".join(feed(detokenizer, ids("the END of it"))) == "the END"


def test_stop_strings_are_not_looked_for_before_min_tokens() -> None:
    detokenizer = Detokenizer(TOKENIZER, stop=["a"], min_tokens=3)
    assert "".join(feed(detokenizer, ids("aabba"))) == "aabb"


def test_a_stop_string_that_only_begins_before_min_tokens_ends_the_answer() -> None:
    detokenizer = Detokenizer(TOKENIZER, stop=["END", "E"], min_tokens=2)
    assert "".join(feed(detokenizer, ids("aEND of it"))) == "a"
    assert detokenizer.stopped_by == "END"


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="abc", max_size=24),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    st.integers(0, 12),
)
def test_min_tokens_is_about_where_a_stop_string_ends(text: str, stops: list[str], min_tokens: int) -> None:
    detokenizer = Detokenizer(TOKENIZER, stop=stops, min_tokens=min_tokens)
    got = "".join(feed(detokenizer, ids(text)))
    ends = [
        (at + len(stop), i, at)
        for i, stop in enumerate(stops)
        for at in range(len(text))
        if text.startswith(stop, at) and at + len(stop) > min_tokens
    ]
    assert got == (text[: min(ends)[2]] if ends else text)


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("a secret é", "b", "b"),
        ("a secret \ufffd", " b", " b"),
        ("\ufffd" * 9, " b", " b"),
    ],
)
def test_nothing_of_the_prompt_is_shown(prompt: str, answer: str, text: str) -> None:
    assert "".join(feed(Detokenizer(TOKENIZER, prime=ids(prompt)), ids(answer))) == text


def test_a_character_may_begin_in_the_prompt() -> None:
    first, second = ids("é")
    pieces = feed(Detokenizer(TOKENIZER, prime=[*ids("a secret "), first]), [second, *ids("!")])
    assert "".join(pieces) == "é!"
    pieces = feed(Detokenizer(TOKENIZER, prime=[*ids("a secret "), first]), ids("b!"))
    assert "".join(pieces) == "b!"


@pytest.mark.parametrize(("skip", "want"), [(True, "ab"), (False, "a<|end|>b")])
def test_special_tokens_are_shown_only_when_asked_for(skip: bool, want: str) -> None:
    token_ids = [*ids("a"), TOKENIZER.token_to_id("<|end|>"), *ids("b")]
    assert "".join(feed(Detokenizer(TOKENIZER, skip_special_tokens=skip), token_ids)) == want


def test_bytes_that_never_become_a_character_are_shown_and_cost_the_same_each() -> None:
    continuation = ids("é")[1]
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.push(continuation) for _ in range(4000)]
    assert "".join(pieces) == "\ufffd" * 4000
    assert "".join(feed(detokenizer, ids("done"))) == "done"


UNKNOWN = 100_000


@pytest.mark.parametrize("token", [TOKENIZER.token_to_id("<|end|>"), UNKNOWN])
def test_tokens_that_have_no_text_cost_the_same_each(token: int) -> None:
    """Decoding those before it with each takes a hundred times as long."""
    detokenizer = Detokenizer(TOKENIZER, skipped={token} - {UNKNOWN})
    count, seconds = 20_000, time.thread_time()
    pieces = [detokenizer.push(token) for _ in range(count)]
    assert not too_long((time.thread_time() - seconds) / count, 100e-6)
    assert "".join([*pieces, *feed(detokenizer, ids("done"))]) == "done"


@pytest.mark.parametrize("count", [1, 15, 16, 40])
def test_tokens_that_have_no_text_part_no_others(count: int) -> None:
    backend = byte_fallback()
    end = backend.token_to_id("</s>")
    tokens = [["▁Hello"], ["</s>"] * count, ["<0xC3>"], ["</s>"] * count, ["<0xA9>", "▁world"]]
    token_ids = [backend.token_to_id(token) for run in tokens for token in run]
    assert "".join(feed(Detokenizer(backend, skipped={end}), token_ids)) == "Helloé world"


def byte_fallback() -> Tokenizer:
    """As Llama's: words with their space, and bytes for what is no word."""
    words = ["<unk>", "▁Hello", "▁world", "a", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return backend


@pytest.mark.parametrize("prompt", ["", "नमस", "สวัสดี", "日本語" * 5, "a😀é😀", "a\ufffd"])
@pytest.mark.parametrize(("new_text", "text"), [(False, " worlda"), (True, "worlda")])
def test_a_first_space_is_known_by_the_prompt_and_shown_where_the_answer_goes_on(
    prompt: str, new_text: bool, text: str
) -> None:
    backend = byte_fallback()
    known = [
        backend.token_to_id("▁Hello"),
        *(backend.token_to_id(f"<0x{byte:02X}>") for byte in prompt.encode()),
    ]
    answer = [backend.token_to_id(token) for token in ("▁world", "a")]
    assert "".join(feed(Detokenizer(backend, prime=known[-8:], new_text=new_text), answer)) == text


WORDS = st.lists(st.sampled_from(["▁Hello", "▁world", "a", *"é🙂न म\n "]), max_size=9)


def fallback_ids(backend: Tokenizer, words: list[str]) -> list[int]:
    found = []
    for word in words:
        token = backend.token_to_id(word)
        found += [backend.token_to_id(f"<0x{byte:02X}>") for byte in word.encode()] if token is None else [token]
    return found


@settings(max_examples=300, deadline=None)
@given(WORDS, WORDS, st.integers(0, 3), st.lists(st.integers(0, 30), max_size=20))
def test_the_text_is_that_of_all_tokens_together(
    before: list[str], words: list[str], cut: int, ends: list[int]
) -> None:
    """Of the answer's alone where it begins anew, also after a prompt that is cut in the middle of a character."""
    backend = byte_fallback()
    end = backend.token_to_id("</s>")
    prompt, answer = fallback_ids(backend, before), fallback_ids(backend, words)
    for place in ends:
        answer.insert(place, end)
    goes_on = Detokenizer(backend, prime=prompt[-8:], skipped={end})
    assert "".join(feed(goes_on, answer)) == backend.decode(prompt + answer)[len(backend.decode(prompt)) :]
    begins = Detokenizer(backend, prime=prompt[: len(prompt) - cut][-8:], new_text=True, skipped={end})
    assert "".join(feed(begins, answer)) == backend.decode(answer)


def test_a_stop_string_may_begin_with_the_space_that_is_not_shown() -> None:
    backend = byte_fallback()
    answer = [backend.token_to_id(token) for token in ("▁world", "a")]
    for stop, text in ((" world", ""), (" worlda", ""), ("da", "worl"), (" worldb", "worlda")):
        detokenizer = Detokenizer(backend, prime=answer[-1:], new_text=True, stop=[stop])
        assert "".join(feed(detokenizer, answer)) == text


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["▁Hello", "<0xC3>", "<0xA9>", "<0xF0>", "<0x9F>", "▁world", "a"], " worlda"),
        (["▁Hello", "<0x0A>", "<0xC3>", "▁world", "a"], " worlda"),
    ],
)
def test_no_word_is_lost_after_broken_bytes(tokens: list[str], text: str) -> None:
    backend = byte_fallback()
    pieces = feed(Detokenizer(backend), [backend.token_to_id(token) for token in tokens])
    assert "".join(pieces).startswith("Hello")
    assert "".join(pieces).endswith(text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 263), max_size=40))
def test_no_tokens_crash_it(token_ids: list[int]) -> None:
    feed(Detokenizer(TOKENIZER), token_ids)
