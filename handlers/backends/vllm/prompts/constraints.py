"""Clients' schemas, expressions and grammars, compiled for the first time in a process that can be ended.

vLLM compiles them on the front's event loop: a hostile one would hold up every request and the health check for
minutes. What has survived our own compiler reaches vLLM as the same grammar that the embedded engine would get.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from handlers.backends.rolling.model_front import vocabulary_of
from handlers.grammars.compiler import GrammarCompiler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from handlers.request import Constraint

logger = logging.getLogger(__name__)

LIBRARY = "guidance"
"""As vLLM calls the library that the embedded engine uses, too."""

_LARK_HEADER = re.compile(r"^\s*%llguidance\b", re.MULTILINE)


class Constraints:
    """Lives on the event loop. Where the operator chose another of vLLM's libraries, constraints pass as they are."""

    def __init__(
        self, config: Any, tokenizer: Any, eos_token_ids: Sequence[int], vocab_size: int, timeout: float
    ) -> None:
        """Blocking. config: vLLM's StructuredOutputsConfig. timeout: seconds that one may be compiled for."""
        self._compact = bool(config.disable_any_whitespace)
        self._compiler: GrammarCompiler | None = None
        if config.backend == LIBRARY:
            vocabulary = vocabulary_of(tokenizer, vocab_size, tuple(eos_token_ids))
            self._compiler = GrammarCompiler(vocabulary, timeout)
        else:
            logger.warning(
                "structured answers: vLLM's library %s looks at clients' schemas and grammars on the event loop, so a "
                "hostile one can hold up the server; option.structured_outputs_config without a backend, or with "
                "%s, avoids that",
                config.backend,
                LIBRARY,
            )

    async def checked(self, constraint: Constraint | None) -> Constraint | None:
        """The same in words that vLLM reads as the embedded engine does. Raises what `GrammarCompiler.compile` does."""
        if constraint is None or self._compiler is None:
            return constraint
        if self._compact and constraint.whitespace_pattern is None:
            constraint = replace(constraint, whitespace_pattern="")
        return in_vllms_words(constraint, await self._compiler.compile(constraint))

    async def close(self) -> None:
        if self._compiler is not None:
            await self._compiler.close()


def in_vllms_words(constraint: Constraint, grammar: str) -> Constraint:
    """grammar: llguidance's, as `handlers.grammars.source` writes it: Lark, or JSON around one schema or Lark text."""
    if grammar.startswith("{"):
        (inner,) = msgspec.json.decode(grammar)["grammars"]
        schema = inner.get("json_schema")
        if schema is not None:
            value = msgspec.json.encode(schema).decode()
            return replace(constraint, kind="json_schema", value=value, whitespace_pattern=None)
        grammar = inner["lark_grammar"]
    if not _LARK_HEADER.search(grammar):
        grammar = f"%llguidance {{}}\n\n{grammar}"  # else vLLM guesses the language
    return replace(constraint, kind="grammar", value=grammar, whitespace_pattern=None)


def choose_library(arguments: Any, tokenizer: Any) -> None:
    """Set it in vLLM's engine arguments unless the operator named one.

    Left to itself vLLM picks one for each request, of which the first serves all later ones.
    """
    config = arguments.structured_outputs_config
    fast = hasattr(tokenizer, "backend_tokenizer") and arguments.tokenizer_mode in ("auto", "hf")
    if config.backend == "auto" and fast:
        config.backend = LIBRARY
