"""The part of an error's message that may be logged: the program's own words, and nothing that a client wrote.

Messages quote what clients sent: a role, a tool's name, what a chat template says of a turn. So everything in quotes is
removed, and so is the text of libraries' exceptions; of the rest only short numbers and words that this program's own
code contains remain.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType

from handlers.errors import ServingError, Unavailable

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("container", "engine", "handlers", "processes", "properties")
_OF_LIBRARIES = frozenset({"expected", "got", "array", "length", "matching", "regex", "json"})
"""Words of msgspec's, whose messages are passed on."""

_QUOTED = re.compile(r"(?<!\w)(?:'(?:[^'\\]|\\.)*(?:'|$)|\"(?:[^\"\\]|\\.)*(?:\"|$))", re.DOTALL)
_WORD = re.compile(r"[^\W\d]\w*")
_LONGEST_NUMBER = 10
_CUT = "…"
_LONGEST = 1000
_RECOGNISED = 20
"""The number of characters by which another exception's text is recognised in a message."""


def own_words_of(error: ServingError) -> str:
    """Return the error's message with `…` for everything that is not the program's own."""
    if isinstance(error, Unavailable):
        return (
            error.message
        )  # says how the server is, nothing of the client's; and is the first while it loads
    message = _without_libraries(error.message[:_LONGEST], error)
    words = _QUOTED.sub(_CUT, message).split()
    return " ".join(word if _is_own(word) else _CUT + word[-1] * (word[-1] in ",;:.") for word in words)


@cache
def own_words() -> frozenset[str]:
    """Return every word in a string of the program's code, docstrings excepted. The first call takes a moment."""
    words = set(_OF_LIBRARIES)
    for package in _PACKAGES:
        for path in (_ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(_ROOT).with_suffix("").parts)
            for text in _texts(SourceFileLoader(name, str(path)).get_code(name)):
                words.update(word.casefold() for word in _WORD.findall(text))
    return frozenset(words)


def _without_libraries(message: str, error: BaseException) -> str:
    """Cut off the message where the text of an exception from a library begins.

    jinja's messages, for example, hold what a template makes of a conversation.
    """
    cause = error.__cause__
    while cause is not None:
        said = str(cause)[:_RECOGNISED]
        if said and not _raised_here(cause) and said in message:
            message = message[: message.index(said)] + _CUT
        cause = cause.__cause__
    return message


def _raised_here(error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not frames:
        return False
    file = Path(frames[-1].f_code.co_filename)
    # not in the folder that holds the packages: an environment with the libraries may lie in it
    return any(file.is_relative_to(_ROOT / package) for package in _PACKAGES)


def _is_own(word: str) -> bool:
    if any(len(digits) > _LONGEST_NUMBER for digits in re.findall(r"\d+", word)):
        return False
    return all(part.casefold() in own_words() for part in _WORD.findall(word))


def _texts(code: CodeType | None) -> Iterator[str]:
    """Yield the string constants of a module, function or class, and of everything in it."""
    if code is None:
        return
    has_docstring = 1 if "__qualname__" in code.co_names else 0  # in a class, its name comes first
    for index, constant in enumerate(code.co_consts):
        if isinstance(constant, CodeType):
            yield from _texts(constant)
        elif isinstance(constant, tuple | frozenset):
            yield from (item for item in constant if isinstance(item, str))
        elif isinstance(constant, str) and index != has_docstring:
            yield constant
