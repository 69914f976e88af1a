"""Clients' schemas, expressions and grammars in vLLM's words.

vLLM compiles them on the front's event loop: a hostile one would hold up every request and the health check for
minutes. So our own compiler comes first, and what has survived it reaches vLLM as the same grammar that the embedded
engine would get.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from handlers.prompts.tokenizer import vocabulary_of

if TYPE_CHECKING:
    from engine.config import Vocabulary
    from handlers.backends.vllm.prompts.front import VllmFront
    from handlers.request import Constraint

logger = logging.getLogger(__name__)

LIBRARY = "guidance"
"""As vLLM calls the library that the embedded engine uses, too."""

_LARK_HEADER = re.compile(r"^\s*%llguidance\b", re.MULTILINE)


def constraint_vocabulary(config: Any, front: VllmFront) -> Vocabulary | None:
    """What our own compiler needs; None where the operator chose another of vLLM's libraries, which compiles itself.

    config: vLLM's StructuredOutputsConfig. Slow.
    """
    if config.backend == LIBRARY:
        return vocabulary_of(front.tokenizer, front.vocab_size, tuple(front.eos_token_ids))
    logger.warning(
        "structured answers: vLLM's library %s looks at clients' schemas and grammars on the event loop, so a "
        "hostile one can hold up the server; option.structured_outputs_config without a backend, or with "
        "%s, avoids that",
        config.backend,
        LIBRARY,
    )
    return None


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

    Otherwise vLLM picks one for the first request and uses it for all later ones.
    """
    config = arguments.structured_outputs_config
    fast = hasattr(tokenizer, "backend_tokenizer") and arguments.tokenizer_mode in ("auto", "hf")
    if config.backend == "auto" and fast:
        config.backend = LIBRARY
