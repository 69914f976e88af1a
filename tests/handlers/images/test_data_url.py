"""`data:` URLs as clients write them."""

from __future__ import annotations

import base64
import contextlib
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.errors import ImageError, ImageTooLarge
from handlers.images import ImageProblem
from handlers.images.data_url import decode_data_url, is_data_url

DATA = bytes(range(256)) * 3 + b"\xfb\xff\xbf~"
TEXT = base64.b64encode(DATA).decode()
LIMIT = 10_000


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{TEXT}",
        f"DATA:IMAGE/PNG;BASE64,{TEXT}",
        f"data:;base64,{TEXT}",
        f"data:image;base64,{TEXT}",
        f"data:application/octet-stream;base64,{TEXT}",
        f"data:image/png;charset=utf-8;name=a.png;base64,{TEXT}",
        f"data:image/png; base64,{TEXT}",
        f"data:image%2Fpng;base64,{TEXT}",
        f"data:image/png;base64,{TEXT.rstrip('=')}",
        f"data:image/png;base64,{TEXT}==",
        f"data:image/png;base64, {TEXT} ",
        f"data:image/png;base64,{base64.urlsafe_b64encode(DATA).decode()}",
        f"data:image/png;base64,{quote(TEXT, safe='')}",
        f"data:image/png;base64,{base64.encodebytes(DATA).decode()}",
        f"data:image/png;base64,{base64.encodebytes(DATA).decode().replace(chr(10), '%0D%0A')}",
        f"data:image/png,{quote(DATA)}",
        f"data:,{quote(DATA)}",
    ],
)
def test_every_spelling_gives_the_same_bytes(url: str) -> None:
    assert is_data_url(url)
    assert decode_data_url(url, LIMIT) == DATA


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:" + "x" * 5000 + ",abc", "no comma"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png,", "is empty"),
        ("data:text/html;base64,QUJD", "does not declare an image"),
        ("data:application/pdf;base64,QUJD", "does not declare an image"),
        ("data:image/svg+xml;base64,QUJD", "SVG images are not supported"),
        ("data:image/png;base64,!!!!", "not valid base64"),
        ("data:image/png;base64,QUJ", ""),
        ("data:image/png;base64,QUJDR", "not valid base64"),
        ("data:image/png;base64,QU\u00e9D", "not valid base64"),
        ("data:image/png;base64,QU\ud800D", "not valid base64"),
    ],
)
def test_refused_data_urls(url: str, reason: str) -> None:
    if not reason:
        assert decode_data_url(url, LIMIT) == b"AB"
        return
    with pytest.raises(ImageProblem) as caught:
        decode_data_url(url, LIMIT)
    assert reason in caught.value.reason
    assert caught.value.error is ImageError


@pytest.mark.parametrize("factor", [1, 10])
def test_the_cap_is_on_decoded_bytes(factor: int) -> None:
    exact = "data:;base64," + base64.b64encode(b"x" * LIMIT).decode()
    assert len(decode_data_url(exact, LIMIT)) == LIMIT
    over = "data:;base64," + base64.b64encode(b"x" * (factor * LIMIT + 1)).decode()
    with pytest.raises(ImageProblem) as caught:
        decode_data_url(over, LIMIT)
    assert caught.value.error is ImageTooLarge
    assert "10000 bytes (option.max_image_bytes)" in caught.value.reason


@given(st.binary(min_size=1, max_size=200))
def test_any_bytes_come_back(data: bytes) -> None:
    assert decode_data_url("data:;base64," + base64.b64encode(data).decode(), LIMIT) == data
    assert decode_data_url("data:;base64," + base64.urlsafe_b64encode(data).decode().rstrip("="), LIMIT) == data
    assert decode_data_url("data:," + quote(data), LIMIT) == data


@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    for start in ("data:", "data:;base64,", "data:,"):
        with contextlib.suppress(ImageProblem):
            assert decode_data_url(start + text, LIMIT)
