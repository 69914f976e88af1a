"""The tokenizer of a model: how it is loaded, and what others must know of its vocabulary."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import Vocabulary
from engine.errors import ModelLoadError, one_line
from handlers.backends.mistral_format import mistral_tokenizer, only_mistral

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(path: str, *, trust_remote_code: bool) -> Any:
    """Return the model's tokenizer as transformers loads it. Slow. Raises ModelLoadError."""
    theirs = mistral_tokenizer(Path(path))
    if theirs is not None and not Path(path, "tokenizer.json").is_file():
        raise ModelLoadError(only_mistral(theirs))
    from transformers import AutoTokenizer

    # Where mistral_common is installed, transformers would take Mistral's own tokenizer, which is not a fast one.
    format: dict[str, Any] = {} if theirs is None else {"mistral_format": False}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **format)
    except Exception as error:  # a damaged file raises whatever the code stumbles over
        raise ModelLoadError(f"the tokenizer cannot be loaded: {one_line(error)}") from error
    if not tokenizer.is_fast:
        raise ModelLoadError("the model has no tokenizer.json; convert its tokenizer to the fast format")
    return tokenizer


def vocabulary_of(
    tokenizer: PreTrainedTokenizerFast,
    size: int,
    eos_token_ids: tuple[int, ...],
    forbidden: tuple[int, ...] = (),
) -> Vocabulary:
    """Return what the engine must know of a vocabulary. size: number of logits. forbidden: tokens never generated."""
    backend = copy.copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return Vocabulary(
        tokenizer=backend.to_str(),
        tokens=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        size=size,
        eos_token_ids=eos_token_ids,
        forbidden=forbidden,
    )


def skipped_tokens(tokenizer: PreTrainedTokenizerFast) -> frozenset[str]:
    """Return the tokens that are left out of a text without special tokens."""
    return frozenset(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
