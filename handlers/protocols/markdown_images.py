"""Images within a text, as Markdown writes them: how LMI, TGI and plain completions name theirs."""

from __future__ import annotations

import re

from handlers.errors import InvalidRequest
from handlers.request import ImagePart, Part, TextPart

MOST_IMAGES = 1024
"""The most images of a text, even if `option.limit_mm_per_prompt` allows more: a long text could name millions."""

_WINDOW = 2**17
"""Characters searched in one step."""

_LONGEST_START = 1020
"""The most characters that `_START` examines."""

_LONGEST_WITH_PARENTHESES = 2**14
"""The most characters of a link with parentheses in its URL; data URLs have none."""

_START = re.compile(r"!\[[^\[\]\n]{0,1000}\]\(\s{0,8}(?=(?i:https?:|data:))")

_END = re.compile(r'(?:\s{1,8}"[^"\n]{0,1000}")?\s{0,8}\)')

# ![alternative text](url "title"): only a link that names its scheme is an image; other Markdown stays text.
_IMAGE = re.compile(
    r'!\[[^\[\]\n]{0,1000}\]\(\s{0,8}((?i:https?:|data:)[^()\s]+(?:\([^()\s]*\)[^()\s]*)*)(?:\s{1,8}"[^"\n]{0,1000}")?\s{0,8}\)'
)


def image_parts(text: str) -> list[Part]:
    """Split a text at its `![](url)` images, in order. Takes time linear in the text's length, whatever it contains.

    Raises:
        InvalidRequest: There are more than `MOST_IMAGES`.
    """
    parts: list[Part] = []
    position = searched = images = 0
    while (start := _start(text, searched)) is not None:
        end = _url_end(text, start.end())
        url = text[start.end() : end]
        if text[end : end + 1] == "(" or url.endswith(":"):
            match = _IMAGE.match(text, start.start(), start.end() + _LONGEST_WITH_PARENTHESES)
            url = match[1] if match is not None else ""
        else:
            match = _END.match(text, end)
        if match is None:
            searched = start.end()
            continue
        if start.start() > position:
            parts.append(TextPart(text[position : start.start()]))
        if (images := images + 1) > MOST_IMAGES:
            raise InvalidRequest(f"the text holds more than {MOST_IMAGES} images")
        parts.append(ImagePart(url))
        position = searched = match.end()
    if position < len(text) or not parts:
        parts.append(TextPart(text[position:]))
    return parts


def _start(text: str, position: int) -> re.Match[str] | None:
    """Find the next start of an image, in windows, since no other thread runs during a search."""
    for at in range(position, len(text), _WINDOW):
        # the end is that of a whole start that begins in the window
        if (start := _START.search(text, at, at + _WINDOW + _LONGEST_START)) is not None:
            return start
    return None


def _url_end(text: str, start: int) -> int:
    """Return the index of the URL's first parenthesis or white space, or else of the end of the text.

    The next image's start has a parenthesis, so no part of the text is searched for two images. A regular expression
    would be several times slower for an image of a megabyte.
    """
    stop = text.find("(", start)
    stop = len(text) if stop < 0 else stop
    close = text.find(")", start, stop)
    stop = stop if close < 0 else close
    for at in range(start, stop, _WINDOW):
        piece = text[at : min(at + _WINDOW, stop)]
        word = "" if piece[0].isspace() else piece.split(None, 1)[0]
        if len(word) < len(piece):
            return at + len(word)
    return stop
