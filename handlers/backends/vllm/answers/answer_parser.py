"""One answer read by a parser of vLLM, whole or delta by delta, as our pieces.

Whole answers go through vLLM's whole extraction, streamed ones through the streaming one, with the tokens that came
with each delta: the two differ in places, as they do in vLLM.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from handlers.errors import raised_at
from handlers.parsers.base import CallArguments, CallBroken, CallStart, Content, Piece, Reasoning
from handlers.parsers.select import openai_call_id

logger = logging.getLogger(__name__)


class VllmParser:
    """Reads one answer with a parser of vLLM: a `handlers.parsers.base.WholeParser`.

    open_parser: makes vLLM's parser and the request that it is given. marks: tokens beside the vocabulary, as text.
    Some parsers lose what comes in one delta with a mark or with a call's end, so tokens go in one by one where they
    can be told apart, the marks in any case. A parser that raises reads no more: what it has
    not shown of the text comes out as content, and so does all that follows.
    """

    def __init__(
        self,
        open_parser: Callable[[], tuple[Any, Any]],
        prompt_token_ids: Sequence[int],
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
        marks: Mapping[int, str],
        name: str,
    ) -> None:
        self._open_parser = open_parser
        self._prompt_token_ids = list(prompt_token_ids)
        self._encode = encode
        self._decode = decode
        self._marks = marks
        self._name = name
        self._opened: tuple[Any, Any] | None = None
        self._failed = False
        self._shown = _Shown()

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        if self._failed:
            return [Content(text)] if text else []
        self._shown.unshown += text
        pieces: list[Piece] = []
        for part, ids in self._cut(text, token_ids if token_ids or not text else self._encode(text)):
            pieces += self._read(part, ids, finished=False)
        return pieces

    def finish(self) -> list[Piece]:
        return self._read("", (), finished=True)

    def whole(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        try:
            parser, request = self._parser()
            told = getattr(parser, "set_prompt_token_ids", None)
            if told is not None:
                told(self._prompt_token_ids)
            reasoning, content, calls = parser.parse(
                text,
                request,
                enable_auto_tools=True,
                model_output_token_ids=list(token_ids) or self._encode(text),
            )
            pieces: list[Piece] = [Reasoning(reasoning)] if reasoning else []
            if content:
                pieces.append(Content(content))
            for index, call in enumerate(calls or ()):
                pieces.append(CallStart(index, getattr(call, "id", None) or openai_call_id(), call.name))
                pieces.append(CallArguments(index, call.arguments))
            return pieces
        except Exception as error:
            self._fail(error)
            return [Content(text)] if text else []

    def _cut(self, text: str, token_ids: Sequence[int]) -> list[tuple[str, Sequence[int]]]:
        """A delta of several tokens as several, around the marks in it."""
        if len(token_ids) < 2:
            return [(text, token_ids)]
        parts: list[tuple[str, Sequence[int]]] = []
        begin = first = 0
        for number, token_id in enumerate(token_ids):
            mark = self._marks.get(token_id)
            at = -1 if mark is None else text.find(mark, begin)
            if mark is None or at < 0:
                continue
            if at > begin or number > first:
                parts += self._singly(text[begin:at], token_ids[first:number])
            parts.append((mark, token_ids[number : number + 1]))
            begin, first = at + len(mark), number + 1
        if begin < len(text) or first < len(token_ids):
            parts += self._singly(text[begin:], token_ids[first:])
        return parts

    def _singly(self, text: str, token_ids: Sequence[int]) -> list[tuple[str, Sequence[int]]]:
        """Character by whole character where the tokens' texts are the text's parts."""
        parts: list[tuple[str, Sequence[int]]] = []
        held: list[int] = []
        for token_id in token_ids if len(token_ids) > 1 else ():
            held.append(token_id)
            if not (more := self._decode(held)).endswith("\ufffd"):
                parts.append((more, held))
                held = []
        return parts if not held and "".join(part for part, _ in parts) == text else [(text, token_ids)]

    def _parser(self) -> tuple[Any, Any]:
        if self._opened is None:
            self._opened = self._open_parser()
        return self._opened

    def _read(self, text: str, token_ids: Sequence[int], *, finished: bool) -> list[Piece]:
        if self._failed:
            return []
        try:
            parser, request = self._parser()
            message = parser.parse_delta(
                text, list(token_ids), request, self._prompt_token_ids, finished=finished
            )
            pieces = [] if message is None else self._shown.pieces(message)
            if finished and (message is None or not message.tool_calls):
                pieces += self._shown.more_arguments(_unstreamed(parser))
            return pieces
        # Any of several dozen parsers may trip over what a model writes; the answer goes on.
        except Exception as error:
            self._fail(error)
            return self._shown.rest()

    def _fail(self, error: Exception) -> None:
        self._failed = True
        # Neither the error's text nor its traceback: they quote the answer.
        file, line, _ = next(iter(raised_at(error)), ("?", 0, ""))
        logger.error(
            "vLLM's parser %s failed with %s at %s:%d; the rest of the answer is shown as content",
            self._name,
            type(error).__name__,
            file,
            line,
        )


def _unstreamed(parser: Any) -> str:
    """Arguments of the last call that vLLM's parser has read and not shown."""
    rest = getattr(getattr(parser, "tool_parser", None), "get_remaining_unstreamed_args", None)
    return "" if rest is None else str(rest())


class _Shown:
    """vLLM's deltas as pieces, and what of the answer's text they have not shown yet."""

    def __init__(self) -> None:
        self.unshown = ""
        self._blank = ""  # white space after a call, which is framing where no text follows
        self._indices: dict[int, int] = {}
        self._early: dict[int, str] = {}
        self._source = ""
        self._arguments: list[str] = []
        self._open: int | None = None

    def pieces(self, message: Any) -> list[Piece]:
        out: list[Piece] = []
        for text, kind in ((message.reasoning, Reasoning), (message.content, Content)):
            if text:
                _, found, after = self.unshown.partition(text)
                self.unshown = after if found else ""
                self._open = None
                if kind is Content and self._indices:
                    self._blank, text = self._blank + text, ""
                    if self._blank.strip():
                        self._blank, text = "", self._blank
                if text:
                    out.append(kind(text))
        for call in message.tool_calls or ():
            out += self._call(call)
        return out

    def _call(self, call: Any) -> list[Piece]:
        name = None if call.function is None else call.function.name
        text = self._early.pop(call.index, "") + ((call.function and call.function.arguments) or "")
        out: list[Piece] = []
        index = self._indices.get(call.index)
        if index is None:
            if not name:
                self._early[call.index] = text
                return []
            index = self._open = self._indices[call.index] = len(self._indices)
            self._source, self._arguments, self._blank = "", [], ""
            out.append(CallStart(index, call.id or openai_call_id(), name))
        if index == self._open:
            self._source, self.unshown = self._source + self.unshown, ""
            self._arguments.append(text)
        if text:
            out.append(CallArguments(index, text))
        return out

    def more_arguments(self, text: str) -> list[Piece]:
        """The end of the last call's."""
        return [CallArguments(self._open, text)] if text and self._open is not None else []

    def rest(self) -> list[Piece]:
        """The parser has failed: what it began is broken, and what it held back is content."""
        out: list[Piece] = []
        if self._open is not None and not _is_object("".join(self._arguments)):
            out.append(CallBroken(self._open, self._source))
        if rest := self._blank + self.unshown:
            out.append(Content(rest))
        self._open, self._blank, self.unshown = None, "", ""
        return out


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
