"""vLLM's own parsers of tool calls and reasoning, behind the interface of `handlers.parsers`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from handlers.backends.vllm.compat import load_parsing
from handlers.errors import InvalidConfiguration, raised_at
from handlers.parsers.base import (
    AnswerFormats,
    CallArguments,
    CallBroken,
    CallStart,
    Content,
    ParserContext,
    Piece,
    Reasoning,
    ReasoningFormat,
    ToolFormat,
)
from handlers.parsers.select import REASONING_FORMATS, TOOL_FORMATS, of_vllm, openai_call_id
from handlers.prompts.tokenizer import skipped_tokens
from properties.names import key_of

if TYPE_CHECKING:
    from properties.settings import Settings

logger = logging.getLogger(__name__)

_HARMONY = frozenset({"openai", "openai_gptoss"})
"""Names of the parsers for gpt-oss, whose format vLLM reads with a parser of its own."""

_EXAMPLE: dict[str, Any] = {
    "type": "function",
    "function": {"name": "example", "parameters": {"type": "object", "properties": {}}},
}


def vllm_parsers(settings: Settings, tokenizer: Any) -> VllmParsers | None:
    """Return vLLM's parsers; None if the options name none of them. Blocks. Raises InvalidConfiguration."""
    tools = of_vllm(settings.tool_call_parser, TOOL_FORMATS)
    reasoning = of_vllm(settings.reasoning_parser, REASONING_FORMATS)
    return None if tools is None and reasoning is None else VllmParsers(settings, tokenizer)


class VllmParsers:
    """Makes vLLM's parsers for the completions of one model.

    Attributes:
        formats: How completions are parsed: by vLLM's parsers where the options name them, by ours otherwise.
        model_config: vLLM's, once the engine has it; in some families the ids of calls depend on it.
    """

    def __init__(self, settings: Settings, tokenizer: Any) -> None:
        """Import vLLM. Blocks.

        Raises InvalidConfiguration if vLLM has no such parser, or if it cannot read this model's completions.
        """
        self._vllm = load_parsing()
        # The parsers ask for the whole vocabulary, which takes a tenth of a second unless it is cached.
        self.tokenizer = self._vllm.get_cached_tokenizer(tokenizer)
        self.model_config: Any = None
        tools, reasoning = settings.tool_call_parser, settings.reasoning_parser
        their_tools, their_reasoning = of_vllm(tools, TOOL_FORMATS), of_vllm(reasoning, REASONING_FORMATS)
        self.formats = AnswerFormats(
            tools=TOOL_FORMATS.get(tools or "")
            if their_tools is None
            else ToolFormat(*self._maker(their_tools, None), openai_call_id),
            auto=tools is not None and settings.enable_auto_tool_choice,
            reasoning=REASONING_FORMATS.get(reasoning or "")
            if their_reasoning is None
            else ReasoningFormat(*self._maker(None, their_reasoning)),
            together=self._maker(their_tools, their_reasoning)[0] if their_tools and their_reasoning else None,
        )

    def _maker(
        self, tools: str | None, reasoning: str | None
    ) -> tuple[Callable[[ParserContext], VllmParser], frozenset[str]]:
        """Return what makes a parser, and the special tokens that it needs to see."""
        option, name = ("tool_call_parser", tools) if tools is not None else ("reasoning_parser", reasoning)
        try:
            kind = self._vllm.ParserManager.get_parser(
                tool_parser_name=tools,
                reasoning_parser_name=reasoning,
                enable_auto_tools=True,
                is_harmony=bool(_HARMONY & {tools, reasoning}),
            )
            parser, request = self._opened(kind, ParserContext([_EXAMPLE] if tools is not None else []))
        # vLLM has dozens of parsers, and any of them may raise anything for the tokenizer of another model.
        except Exception as error:
            raise InvalidConfiguration(
                f"{key_of(option)} = {name!r}: vLLM's parser cannot read this model's answers: {error}"
            ) from error
        special = _wants_special(parser, request)
        markers = frozenset(skipped_tokens(self.tokenizer)) if special else frozenset[str]()

        def make(asked: ParserContext) -> VllmParser:
            return VllmParser(lambda: self._opened(kind, asked), self.tokenizer, asked.prompt_token_ids, str(name))

        return make, markers

    def _opened(self, kind: Any, asked: ParserContext) -> tuple[Any, Any]:
        """Return vLLM's parser and the request that it is given, with only those parts of tools that we check."""
        checked = ("name", "description", "parameters")
        functions = [{key: part for key, part in tool["function"].items() if key in checked} for tool in asked.tools]
        variables = dict(asked.template_kwargs)
        request = self._vllm.ChatCompletionRequest(
            messages=[{"role": "user", "content": ""}],
            tools=[{"type": "function", "function": function} for function in functions] or None,
            # Since 0.33 the default is None, which would hide whether the parser changes it.
            skip_special_tokens=True,
            tool_choice="auto" if functions else "none",
            chat_template_kwargs=variables,
        )
        parser = kind(self.tokenizer, request.tools, chat_template_kwargs=variables, model_config=self.model_config)
        return parser, request


def _wants_special(parser: Any, request: Any) -> bool:
    """Whether the parser wants special tokens kept in the text."""
    try:
        return not parser.adjust_request(request).skip_special_tokens
    # This also builds grammars, which our requests do not need; a failure says nothing about tokens.
    except Exception as error:
        logger.debug("vLLM's parser does not say whether it wants special tokens: %s", error)
        return True


class VllmParser:
    """Parses one completion with a parser of vLLM's: a `handlers.parsers.base.WholeParser`.

    A whole completion goes through vLLM's extraction of whole completions, which differs in places from the streaming
    one, as it does in vLLM. A parser that raises is not used again: what it has not shown of the text, and all that
    follows, is content.
    """

    def __init__(
        self, open_parser: Callable[[], tuple[Any, Any]], tokenizer: Any, prompt_token_ids: Sequence[int], name: str
    ) -> None:
        """open_parser: makes vLLM's parser and the request that it is given. name: for the log."""
        self.open_parser = open_parser
        self.tokenizer = tokenizer
        self._prompt_token_ids = list(prompt_token_ids)
        self._name = name
        self._failed = False
        self._shown = _Shown()

    @cached_property
    def _opened(self) -> tuple[Any, Any]:
        return self.open_parser()

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        if self._failed:
            return [Content(text)] if text else []
        self._shown.unshown += text
        pieces: list[Piece] = []
        for part, ids in self._cut(text, token_ids or self._encode(text)):
            pieces += self._read(part, ids, finished=False)
        return pieces

    def finish(self) -> list[Piece]:
        return self._read("", (), finished=True)

    def whole(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        try:
            parser, request = self._opened
            parser.set_prompt_token_ids(self._prompt_token_ids)
            reasoning, content, calls = parser.parse(
                text, request, enable_auto_tools=True, model_output_token_ids=list(token_ids) or self._encode(text)
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

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _cut(self, text: str, token_ids: Sequence[int]) -> list[tuple[str, Sequence[int]]]:
        """Cut a delta into its tokens, unless their texts are not those of the delta.

        In vLLM 0.32 some parsers (deepseek_v3, deepseek_r1) lose what comes in one delta with a special token. A token
        without text is passed on too, since parsers recognise special tokens by their ids.
        """
        parts: list[tuple[str, Sequence[int]]] = []
        held: list[int] = []
        at = 0
        for token_id in token_ids if len(token_ids) > 1 else ():
            held.append(token_id)
            more = str(self.tokenizer.decode(held, skip_special_tokens=False))
            if more.endswith("\ufffd"):
                continue
            if not text.startswith(more, at):
                more = f" {more}"  # SentencePiece's decoders omit the blank with which a text begins
            if not text.startswith(more, at):
                break
            parts.append((more, held))
            at, held = at + len(more), []
        return parts if parts and not held and at == len(text) else [(text, token_ids)]

    def _read(self, text: str, token_ids: Sequence[int], *, finished: bool) -> list[Piece]:
        if self._failed:
            return []
        try:
            parser, request = self._opened
            message = parser.parse_delta(text, list(token_ids), request, self._prompt_token_ids, finished=finished)
            pieces = [] if message is None else self._shown.pieces(message)
            if finished and parser.tool_parser is not None and (message is None or not message.tool_calls):
                pieces += self._shown.more_arguments(parser.tool_parser.get_remaining_unstreamed_args())
            return pieces
        # Any of several dozen parsers may fail on what a model writes; the completion goes on.
        except Exception as error:
            self._fail(error)
            return self._shown.rest()

    def _fail(self, error: Exception) -> None:
        self._failed = True
        # Neither the error's text nor its traceback, which quote the completion.
        file, line, _ = next(iter(raised_at(error)), ("?", 0, ""))
        text = "vLLM's parser %s failed with %s at %s:%d; the rest of the answer is shown as content"
        logger.error(text, self._name, type(error).__name__, file, line)


class _Shown:
    """Turns vLLM's deltas into pieces, and keeps the text that they have not shown yet."""

    def __init__(self) -> None:
        self.unshown = ""
        self._blank = ""  # white space after a call, which belongs to the format unless text follows
        self._indices: dict[int, int] = {}
        self._early: dict[int, str] = {}  # arguments that came before the name
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
        """Return the last of the open call's arguments."""
        return [CallArguments(self._open, text)] if text and self._open is not None else []

    def rest(self) -> list[Piece]:
        """Return what is left when the parser has failed: the open call is broken, and the rest is content."""
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
