"""Images in Markdown are found the fast way as one plain pattern would find them."""

from __future__ import annotations

import re
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.errors import InvalidRequest
from handlers.protocols.markdown_images import MOST_IMAGES, image_parts
from handlers.request import ImagePart, Part, TextPart
from tests.support.pace import too_long

_PLAIN = re.compile(
    r'!\[[^\[\]\n]{0,1000}\]\(\s{0,8}((?i:https?:|data:)[^()\s]+(?:\([^()\s]*\)[^()\s]*)*)(?:\s{1,8}"[^"\n]{0,1000}")?\s{0,8}\)'
)
_PIECES = (
    "![", "](", ")", "(", "data:", "http:", "https:", "HTTPS:", " ", "\n", '"', "a", "![](", "![x](data:", "x)",
    ' "t"', "[", "]", "\x1c", "é", "![](https:", "![](http:)", "!", "![](data:,x)",
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(_PIECES), max_size=14).map("".join))
def test_the_same_images_as_by_the_pattern(text: str) -> None:
    expected: list[Part] = []
    for number, piece in enumerate(_PLAIN.split(text)):
        if number % 2:
            expected.append(ImagePart(piece))
        elif piece:
            expected.append(TextPart(piece))
    assert image_parts(text) == (expected or [TextPart("")])


@pytest.mark.parametrize(
    "text",
    [
        "![](data:x " * 200_000,
        "![](data:" * 200_000 + ")",
        "![](data:x) " * 100_000,
        "![" * 1_000_000,
        "![](data:x(a" * 100_000 + ")",
        "![](data:x(a" * 100_000,
        '![](data:x "' * 100_000,
        "![](data:" + "x " * 1_000_000,
    ],
)
def test_no_text_takes_more_than_linear_time(text: str) -> None:
    start = time.thread_time()
    with suppress(InvalidRequest):
        image_parts(text)
    assert not too_long(time.thread_time() - start, 5)


@pytest.mark.parametrize("tail", ['"a cat"', ' "a (small) cat"', "", "\n", "\t "])
def test_a_large_data_url_may_have_a_title_or_white_space_behind_it(tail: str) -> None:
    for size in (2**14 - 40, 2**14 + 1, 2**17 - 22, 2**17, 2**20):
        url = "data:image/png;base64," + "A" * size
        found = image_parts(f"before ![a]({url} {tail}) after")
        assert found == [TextPart("before "), ImagePart(url), TextPart(" after")], size


def test_no_more_images_are_cut_out_than_any_prompt_holds() -> None:
    assert len(image_parts("![](http:a)" * MOST_IMAGES)) == MOST_IMAGES
    with pytest.raises(InvalidRequest, match="more than 1024 images"):
        image_parts("x ![](http:a)" * (MOST_IMAGES + 1))
