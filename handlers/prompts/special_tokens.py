"""Client text stays text: control tokens that a client typed are never read as control tokens.

A tokenizer finds its special tokens anywhere in a prompt, also in the user's text. So the client's text is searched
first. Each control token in it, and each end of a text that could form one together with its neighbours, is replaced by
a mark (`Hidden`). Then the template is rendered: each control token that is still visible was printed by the template.
"""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

_END = chr(0xF8FF)
_MARK = f"(?P<mark>[\ue000-\ue0ff]{{10}}[0-9]+{_END})"
_MARKS = re.compile(_MARK)
_LONGEST_MARK = 32

SEARCH_WINDOW = 2**17
"""Characters searched in one step, since no other thread runs during a search."""

LONG_TEXT = 10_000
"""Characters of a text that is encoded without stopping all other threads."""


def encode(text: str, tokenizer: Tokenizer, add_special_tokens: bool) -> Encoding:
    """Encode a text as a batch of one: a tokenizer lets other threads run only while it encodes a batch."""
    if len(text) < LONG_TEXT:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]


def _matches(pattern: re.Pattern[str], text: str, longest: int, window: int) -> Iterator[re.Match[str]]:
    """As `finditer`, in windows. longest: characters of a match at most; it is never empty."""
    at = 0
    while at < len(text):
        end = at + window
        for match in pattern.finditer(text, at, end + longest):
            if match.start() >= end:
                break
            yield match
            at = match.end()
        at = max(at, end)


def token_places(encoding: Encoding) -> list[tuple[int, int]]:
    """Return where each token is in its text, (start, stop) in characters; (0, 0) for one that was added.

    The offsets are read one by one, because reading all of them at once would stop the other threads.
    """
    return [encoding.token_to_chars(number) or (0, 0) for number in range(len(encoding.ids))]


def _fresh_name() -> str:
    """Ten private-use characters, 80 random bits."""
    return "".join(chr(0xE000 + byte) for byte in secrets.token_bytes(10))


class ControlTokens:
    """Strings that must not act as control tokens when a client types them.

    Attributes:
        window: Characters of a prompt that are searched in one step.
    """

    def __init__(self, tokens: Iterable[str], window: int = SEARCH_WINDOW) -> None:
        self.window = window
        self.tokens = sorted(set(tokens), key=lambda token: (-len(token), token))
        self.pattern = "|".join(map(re.escape, self.tokens)) or r"(?!)"
        self._whole = re.compile(self.pattern)
        self._starts = {token[:n] for token in self.tokens for n in range(1, len(token))}
        self._ends = {token[-n:] for token in self.tokens for n in range(1, len(token))}
        self._longest = len(self.tokens[0]) - 1 if self.tokens else 0

    def spans(self, text: str, *, alone: bool) -> list[tuple[int, int]]:
        """Return where the text contains a control token, or at either end (apart from white space) part of one.

        Args:
            text: The client's text.
            alone: Whether to include a text that is, as a whole, the middle of a control token.
        """
        spans = [match.span() for match in _matches(self._whole, text, self._longest + 1, self.window)]
        if not self.tokens or not text:
            return spans
        first, last = len(text) - len(text.lstrip()), len(text.rstrip())
        if first >= last:
            return spans
        if alone and last - first < self._longest and any(text[first:last] in token for token in self.tokens):
            return [(first, last)]
        longest = min(self._longest, last - first)
        for n in range(longest, 0, -1):
            if text[first : first + n] in self._ends:
                spans.append((first, first + n))
                break
        for n in range(longest, 0, -1):
            if text[last - n : last] in self._starts:
                spans.append((last - n, last))
                break
        return _merged(spans)


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


class Hidden:
    """The marks of one prompt. They contain a random name, new for each prompt, so that no client can write one."""

    def __init__(self, control: ControlTokens) -> None:
        self._control = control
        self._name = ""
        self.literals: dict[str, str] = {}

    def text(self, text: str, *, alone: bool = False) -> str:
        """Return a text with marks in place of control tokens. alone: see `ControlTokens.spans`."""
        spans = self._control.spans(text, alone=alone)
        if not spans:
            return text
        pieces, position = [], 0
        for start, end in spans:
            self._name = self._name or _fresh_name()
            mark = f"{self._name}{len(self.literals)}{_END}"
            self.literals[mark] = text[start:end]
            pieces += [text[position:start], mark]
            position = end
        return "".join([*pieces, text[position:]])

    def value(self, value: Any) -> Any:
        """Hide control tokens in every string of a JSON value, including keys."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if isinstance(value, dict):
            return {self.value(key): self.value(item) for key, item in value.items()}
        return value

    def restore(self, text: str) -> str:
        """Return the text of the client and the template without marks."""
        if not self.literals:
            return text
        pieces, position = [], 0
        for match in _matches(_MARKS, text, _LONGEST_MARK, self._control.window):
            pieces += [text[position : match.start()], self.literals.get(match[0], match[0])]
            position = match.end()
        return "".join([*pieces, text[position:]])


@dataclass(frozen=True, slots=True)
class LiteralEncoding:
    """The tokens of a prompt, and what is needed to find them in its text.

    Attributes:
        ids: The tokens.
        sources: For each of them, the number of its token in `encoding`.
        encoding: The encoding with anchors.
        borders: Where each piece begins, in the encoded text and in the text that people see.
    """

    ids: list[int]
    sources: list[int]
    encoding: Encoding
    borders: list[tuple[int, int]]

    def spans(self) -> list[tuple[int, int]]:
        """Return the (start, stop) of each token in the text that people see, in characters."""
        starts = [encoded for encoded, _ in self.borders]
        shifts = [seen - encoded for encoded, seen in self.borders]

        def seen(position: int) -> int:
            return position + shifts[bisect_right(starts, position) - 1]

        places = token_places(self.encoding)
        return [
            (seen(places[source][0]), seen(places[source][1])) if places[source][1] else (0, 0)
            for source in self.sources
        ]


class LiteralEncoder:
    """Encodes text in which only chosen control tokens count, exactly as the tokenizer would encode the rest.

    It uses a copy of the tokenizer that reads no control token at all. A control token that counts is written as an
    anchor, which is an added token with the same white-space rules, and gets its own id after encoding.
    """

    def __init__(self, backend: Tokenizer, control: ControlTokens) -> None:
        description = json.loads(backend.to_str())
        flags = {token["content"]: token for token in description["added_tokens"]}
        for token in control.tokens:
            if token in flags:
                flags[token]["special"] = True
        self._backend = Tokenizer.from_str(json.dumps(description))
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        nonce = _fresh_name()
        anchors = {(left, right): f"{nonce}{left:d}{right:d}{_END}" for left in (0, 1) for right in (0, 1)}
        self._backend.add_tokens(
            [
                AddedToken(anchor, lstrip=bool(left), rstrip=bool(right), normalized=False, special=False)
                for (left, right), anchor in anchors.items()
            ]
        )
        self._anchor_ids = {self._backend.token_to_id(anchor) for anchor in anchors.values()}
        plain = {"lstrip": False, "rstrip": False}
        self._anchor_of = {
            token: anchors[int(flags.get(token, plain)["lstrip"]), int(flags.get(token, plain)["rstrip"])]
            for token in control.tokens
        }
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._id_of = {token: vocabulary[token] for token in control.tokens}
        self._control_ids = set(self._id_of.values()) - _unknown_ids(description["model"], vocabulary)
        self._text_of = {i: token for token, i in self._id_of.items()}
        self._pattern = re.compile(f"{_MARK}|{control.pattern}")
        self._longest = max(_LONGEST_MARK, *map(len, control.tokens), 0)
        self._window = control.window

    def encode(
        self, rendered: str, hidden: Hidden, add_special_tokens: bool, require_room: Callable[[int], None]
    ) -> LiteralEncoding:
        """Encode a rendered prompt, in which visible control tokens count and marks stand for literal text.

        Args:
            rendered: The prompt with marks.
            hidden: What the marks stand for.
            add_special_tokens: Whether the tokenizer adds its own.
            require_room: Called with the number of tokens before they become a list; it may raise.
        """
        pieces: list[str] = []
        counted: list[int] = []
        borders = [(0, 0)]
        position = encoded = seen = 0
        for match in _matches(self._pattern, rendered, self._longest, self._window):
            pieces.append(rendered[position : match.start()])
            if match["mark"] is not None:
                piece = shown = hidden.literals.get(match[0], match[0])
            else:
                piece, shown = self._anchor_of[match[0]], match[0]
                counted.append(self._id_of[shown])
            pieces.append(piece)
            plain = match.start() - position
            encoded, seen = encoded + plain + len(piece), seen + plain + len(shown)
            borders.append((encoded, seen))
            position = match.end()
        pieces.append(rendered[position:])
        encoding = encode("".join(pieces), self._backend, add_special_tokens)
        require_room(len(encoding))
        ids, sources = self._with_ids(encoding.ids, encoding.special_tokens_mask, counted)
        return LiteralEncoding(ids, sources, encoding, borders)

    def _with_ids(
        self, ids: Sequence[int], added: Sequence[int], counted: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Replace anchors by their tokens, and spell out control tokens that plain text happened to become.

        Returns the ids, and for each the number of the token that it came from.
        """
        result: list[int] = []
        sources: list[int] = []
        remaining = iter(counted)
        for number, (token_id, is_added) in enumerate(zip(ids, added, strict=True)):
            if token_id in self._anchor_ids:
                result.append(next(remaining))
            elif token_id in self._control_ids and not is_added:
                result += self._spelled(token_id)
            else:
                result.append(token_id)
            sources += [number] * (len(result) - len(sources))
        return result, sources

    def _spelled(self, token_id: int) -> list[int]:
        letters = self._text_of[token_id]
        ids = [i for letter in letters for i in self._backend.encode(letter, add_special_tokens=False).ids]
        return ids if token_id not in ids else [i for i in ids if i != token_id]


def _unknown_ids(model: dict[str, Any], vocabulary: dict[str, int]) -> set[int]:
    """Return the ids that mean "unknown", which ordinary text may get. Unigram models give a number, others a name."""
    ids = {vocabulary[token] for token in [model.get("unk_token")] if token in vocabulary}
    return ids | {model["unk_id"]} if model.get("unk_id") is not None else ids
