"""Pictures within a text, as Markdown writes them: how LMI, TGI and plain completions name theirs."""

from __future__ import annotations

import re

from handlers.request import ImagePart, Part, TextPart

# ![alternative text](url "title"): only a link that names its scheme is a picture; other Markdown stays text.
_PICTURE = re.compile(
    r'!\[[^\[\]\n]{0,1000}\]\(\s{0,8}((?i:https?:|data:)[^()\s]+(?:\([^()\s]*\)[^()\s]*)*)(?:\s{1,8}"[^"\n]{0,1000}")?\s{0,8}\)',
)


def picture_parts(text: str) -> list[Part]:
    """Text with its `![](url)` pictures cut out, in order."""
    parts: list[Part] = []
    position = 0
    for match in _PICTURE.finditer(text):
        if match.start() > position:
            parts.append(TextPart(text[position : match.start()]))
        parts.append(ImagePart(match[1]))
        position = match.end()
    if position < len(text) or not parts:
        parts.append(TextPart(text[position:]))
    return parts
