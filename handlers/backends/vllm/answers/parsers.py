"""vLLM's own parsers of calls and reasoning by their names, behind the interface of `handlers.parsers`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from handlers.backends.vllm.answers.answer_parser import VllmParser
from handlers.backends.vllm.compat import load_parsing
from handlers.errors import InvalidConfiguration
from handlers.parsers.base import AnswerFormats, Asked, ReasoningFormat, ToolFormat
from handlers.parsers.select import REASONING_FORMATS, TOOL_FORMATS, answer_formats, of_vllm, openai_call_id
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


class VllmParsers:
    """Makes vLLM's parsers for the answers of one model.

    model_config: vLLM's, once the engine has it; ids of calls depend on it in some families.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Blocking: imports vLLM. Raises InvalidConfiguration."""
        self._vllm = load_parsing()
        # The parsers ask for the whole vocabulary, which costs a tenth of a second where it is not remembered.
        self._tokenizer = self._vllm.get_cached_tokenizer(tokenizer)
        self._marks = {token_id: text for text, token_id in self._tokenizer.get_added_vocab().items()}
        self.model_config: Any = None

    def formats(self, settings: Settings) -> AnswerFormats:
        """How the options say that answers are read: by vLLM's parsers where they name these, by ours elsewhere.

        Raises InvalidConfiguration where vLLM has no such parser, or it cannot read this model's answers.
        """
        tools, reasoning = settings.tool_call_parser, settings.reasoning_parser
        their_tools, their_reasoning = of_vllm(tools, TOOL_FORMATS), of_vllm(reasoning, REASONING_FORMATS)
        ours = answer_formats(
            tools if their_tools is None else None,
            settings.enable_auto_tool_choice,
            reasoning if their_reasoning is None else None,
        )
        tool_format, reasoning_format, together = ours.tools, ours.reasoning, None
        if their_tools is not None:
            make, markers = self._maker(their_tools, None)
            tool_format = ToolFormat(make, markers, openai_call_id)
        if their_reasoning is not None:
            make, markers = self._maker(None, their_reasoning)
            reasoning_format = ReasoningFormat(make, markers)
        if their_tools is not None and their_reasoning is not None:
            together, _ = self._maker(their_tools, their_reasoning)
        auto = settings.enable_auto_tool_choice and tool_format is not None
        return AnswerFormats(tool_format, auto, reasoning_format, together)

    def _maker(
        self, tools: str | None, reasoning: str | None
    ) -> tuple[Callable[[Asked], VllmParser], frozenset[str]]:
        """A format's parser and markers."""
        option, name = ("tool_call_parser", tools) if tools is not None else ("reasoning_parser", reasoning)
        try:
            kind = self._vllm.ParserManager.get_parser(
                tool_parser_name=tools,
                reasoning_parser_name=reasoning,
                enable_auto_tools=True,
                is_harmony=bool(_HARMONY & {tools, reasoning}),
            )
            request = self._request([_EXAMPLE] if tools is not None else [], {})
            parser = self._parser(kind, request, {})
        # Whatever one of several dozen parsers raises for a tokenizer that is not its model's.
        except Exception as error:
            raise InvalidConfiguration(
                f"{key_of(option)} = {name!r}: vLLM's parser cannot read this model's answers: {error}"
            ) from error
        markers = (
            frozenset(skipped_tokens(self._tokenizer)) if _wants_special(parser, request) else frozenset()
        )

        def make(asked: Asked) -> VllmParser:
            def open_parser() -> tuple[Any, Any]:
                request = self._request(asked.tools, asked.template_kwargs)
                return self._parser(kind, request, asked.template_kwargs), request

            return VllmParser(
                open_parser, asked.prompt_token_ids, self._encode, self._decode, self._marks, str(name)
            )

        return make, markers

    def _parser(self, kind: Any, request: Any, template_kwargs: Mapping[str, Any]) -> Any:
        return kind(
            self._tokenizer,
            request.tools,
            chat_template_kwargs=dict(template_kwargs),
            model_config=self.model_config,
        )

    def _request(self, tools: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any]) -> Any:
        """What vLLM's parsers look at: the tools, of which only what our reader has checked."""
        kept = [
            {
                "type": "function",
                "function": {
                    key: tool["function"][key]
                    for key in ("name", "description", "parameters")
                    if key in tool["function"]
                },
            }
            for tool in tools
        ]
        return self._vllm.ChatCompletionRequest(
            messages=[{"role": "user", "content": ""}],
            tools=kept or None,
            # Not said, it is None since 0.33, and whether the parser changes it could not be told.
            skip_special_tokens=True,
            tool_choice="auto" if kept else "none",
            chat_template_kwargs=dict(template_kwargs),
        )

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def _wants_special(parser: Any, request: Any) -> bool:
    """Whether the parser has special tokens kept in the text."""
    try:
        return not parser.adjust_request(request).skip_special_tokens
    # It also builds grammars, which ours do not need; one that it cannot build says nothing of tokens.
    except Exception as error:
        logger.debug("vLLM's parser does not say whether it wants special tokens: %s", error)
        return True


def vllm_parsers(settings: Settings, tokenizer: Any) -> VllmParsers | None:
    """None where the options name none of vLLM's. Blocking. Raises InvalidConfiguration."""
    if of_vllm(settings.tool_call_parser, TOOL_FORMATS) or of_vllm(
        settings.reasoning_parser, REASONING_FORMATS
    ):
        return VllmParsers(tokenizer)
    return None
