"""Pictures within a text, as Markdown writes them: how LMI, TGI and plain completions name theirs."""

from __future__ import annotations

import re

from handlers.errors import InvalidRequest
from handlers.request import ImagePart, Part, TextPart

MOST_PICTURES = 1024
"""In one text, whatever `option.limit_mm_per_prompt` says: no prompt holds as many, but a long text could hold
millions."""

_WINDOW = 2**17
"""Characters that are searched in one step."""

_LONGEST_START = 1020
"""Characters that `_START` matches or looks at, at most."""

_LONGEST_WITH_PARENTHESES = 2**14
"""Characters of a link with parentheses or white space in it; data URLs have none."""

_START = re.compile(r"!\[[^\[\]\n]{0,1000}\]\(\s{0,8}(?=(?i:https?:|data:))")

# ![alternative text](url "title"): only a link that names its scheme is a picture; other Markdown stays text.
_PICTURE = re.compile(
    r'!\[[^\[\]\n]{0,1000}\]\(\s{0,8}((?i:https?:|data:)[^()\s]+(?:\([^()\s]*\)[^()\s]*)*)(?:\s{1,8}"[^"\n]{0,1000}")?\s{0,8}\)',
)


def picture_parts(text: str) -> list[Part]:
    """Text with its `![](url)` pictures cut out, in order. Linear in the text's length, whatever it holds.

    Raises InvalidRequest for more than `MOST_PICTURES`.
    """
    parts: list[Part] = []
    position = searched = close = pictures = 0
    while (start := _start(text, searched)) is not None:
        if close < start.end():
            close = text.find(")", start.end())
            if close < 0:
                break
        url, end = _plain_url(text, start.end(), close), close + 1
        if url is None:
            match = _PICTURE.match(text, start.start(), start.end() + _LONGEST_WITH_PARENTHESES)
            if match is None:
                searched = start.end()
                continue
            url, end = match[1], match.end()
        if start.start() > position:
            parts.append(TextPart(text[position : start.start()]))
        if (pictures := pictures + 1) > MOST_PICTURES:
            raise InvalidRequest(f"the text holds more than {MOST_PICTURES} pictures")
        parts.append(ImagePart(url))
        position = searched = end
    if position < len(text) or not parts:
        parts.append(TextPart(text[position:]))
    return parts


def _start(text: str, position: int) -> re.Match[str] | None:
    """The next start of a picture. A search is one step for other threads, so it is made in windows."""
    for at in range(position, len(text), _WINDOW):
        # the end is that of a whole start that begins in the window
        if (start := _START.search(text, at, at + _WINDOW + _LONGEST_START)) is not None:
            return start
    return None


def _plain_url(text: str, start: int, close: int) -> str | None:
    """The URL up to the next parenthesis, where nothing else stands before it; the pattern is several times slower
    for a picture of a megabyte."""
    if text.find("(", start, close) >= 0:
        return None
    for at in range(start, close, _WINDOW):
        piece = text[at : min(at + _WINDOW, close)]
        if piece.split(None, 1) != [piece]:
            return None
    return text[start:close] if start < close and text[close - 1] != ":" else None
