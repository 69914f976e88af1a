"""What stands for an image in prompts for vLLM, for each way in which its models want it; no vLLM is needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.errors import ModelLoadError
from handlers.backends.vllm.prompts import ImagePlaceholders, image_placeholders, replaced
from tests.support.models import CHAT_TEMPLATE, make_tokenizer

TOKENIZER = make_tokenizer()
IMAGE, USER, PAD = (TOKENIZER.convert_tokens_to_ids(token) for token in ("<image>", "<|user|>", "<pad>"))


def text(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids))


def written(places: ImagePlaceholders, ids: list[int], token_id: int) -> list[int]:
    return ids if places.written is None else replaced(ids, token_id, places.written)


def always(placeholder: str | None) -> Callable[[int], str | None]:
    return lambda number: placeholder


def test_a_placeholder_of_one_token_stands_for_itself() -> None:
    places = image_placeholders(TOKENIZER, always("<image>"), None)
    assert (places.token, places.placeholder) == ("<image>", "<image>")
    assert written(places, [USER, IMAGE, 5], IMAGE) == [USER, IMAGE, 5]


def test_the_configs_token_within_a_longer_placeholder() -> None:
    places = image_placeholders(TOKENIZER, always("<|user|><image><|end|>"), IMAGE)
    assert (places.token, places.placeholder) == ("<image>", "<|user|><image><|end|>")
    assert written(places, [IMAGE], IMAGE) == [IMAGE]


def test_the_configs_token_where_vllm_writes_another_ones() -> None:
    places = image_placeholders(TOKENIZER, always("[IMG]"), IMAGE)
    assert (places.token, places.placeholder) == ("<image>", "<image>")


def test_a_placeholder_of_many_tokens_has_a_stand_in_that_no_template_prints() -> None:
    places = image_placeholders(TOKENIZER, always("[IMG]"), None, printed=CHAT_TEMPLATE)
    assert places.token == "<pad>"
    assert text(written(places, [USER, PAD, 5, PAD], PAD)) == "<|user|>[IMG]&[IMG]"


def test_placeholders_that_count() -> None:
    places = image_placeholders(TOKENIZER, lambda number: f"<|image_{number}|>", None, printed=CHAT_TEMPLATE)
    assert text(written(places, [PAD, 5, PAD], PAD)) == "<|image_1|>&<|image_2|>"


def test_a_processor_that_inserts_wants_nothing_in_the_prompt() -> None:
    places = image_placeholders(TOKENIZER, always(None), IMAGE, inserts=True)
    assert places.token == "<image>"
    assert written(places, [IMAGE, USER, IMAGE], IMAGE) == [USER]


def test_the_operators_token_wins() -> None:
    assert image_placeholders(TOKENIZER, always("[IMG]"), IMAGE, "<|system|>").token == "<|system|>"


def test_what_cannot_be_told_is_asked_for() -> None:
    with pytest.raises(ModelLoadError, match=r"option\.image_placeholder_token"):
        image_placeholders(TOKENIZER, always(None), None)
