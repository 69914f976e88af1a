"""The tokenizer of a model: loading it, its vocabulary for the engine, and text from its tokens as they arrive.

Text is passed on in whole characters only, and stop strings are found across tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from engine.config import Vocabulary
from engine.errors import ModelLoadError, one_line
from handlers.backends.mistral_format import mistral_tokenizer, only_mistral
from handlers.request import RequestSampling

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
    except Exception as error:  # a damaged file may raise anything
        file = _damaged_file(Path(path))
        where = f" from {file}, which is damaged (fetch it again)" if file else ""
        raise ModelLoadError(f"the tokenizer cannot be loaded{where}: {one_line(error)}") from error
    if not tokenizer.is_fast:
        raise ModelLoadError("the model has no tokenizer.json; convert its tokenizer to the fast format")
    return tokenizer


def _damaged_file(folder: Path) -> str | None:
    """Return the name of the tokenizer's file that cannot be read; None where each can."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"):
        try:
            msgspec.json.decode((folder / name).read_bytes(), type=dict[str, Any])
            if name == "tokenizer.json":
                Tokenizer.from_file(str(folder / name))
        except FileNotFoundError:
            continue
        except Exception:  # the library raises plain Exceptions
            return name
    return None


def vocabulary_of(
    tokenizer: PreTrainedTokenizerFast, size: int, eos_token_ids: tuple[int, ...], forbidden: tuple[int, ...] = ()
) -> Vocabulary:
    """Return the vocabulary for the engine. size: number of logits. forbidden: tokens that are never generated."""
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


UNDECODABLE = "\ufffd"

LONGEST_CHARACTER = 4
"""The most bytes of a character, and so the most tokens of which it can consist."""

MOST_TEXTLESS = 16
"""Tokens that may wait for the rest of a character."""


class Detokenizer:
    """The text of one answer. Text that may be the beginning of a stop string is held back until that is decided."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        prime: Sequence[int] = (),
        new_text: bool = False,
        skipped: Set[int] = frozenset(),
    ) -> None:
        """Begin an answer.

        Args:
            tokenizer: The model's tokenizer.
            stop: Strings that end the answer.
            include_stop: Whether the text includes the stop string.
            min_tokens: A stop string that is complete within this many tokens does not count.
            skip_special_tokens: Whether special tokens are left out of the text.
            prime: The prompt's last tokens, since a word's space depends on what precedes it.
            new_text: Whether the answer begins a new text: a first space that only separates it from the prompt is not
                shown, but stop strings may begin with it.
            skipped: Tokens that never have text.
        """
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._skipped = skipped
        self._new_text = new_text
        self._drop_space = False
        self._textless: list[int] = []
        self._last: list[int] = []
        self._marks_to_drop = 0
        self._stream = self._primed(list(prime), continues=not new_text)
        self._stop = tuple(text for text in stop if text)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._longest_stop = max((len(text) for text in self._stop), default=0)
        self._count = 0
        self._held = ""
        self._early = 0
        self.stopped_by: str | None = None
        """The stop string that ended the answer."""

    def pieces(self, token_ids: Sequence[int], *, silent: bool = False, finished: bool = False) -> list[str]:
        """Return the text that each token makes certain.

        Args:
            token_ids: The new tokens.
            silent: The last one has no text itself.
            finished: No token follows, so the last one makes certain what was held back. Without a token, the text held
                back gets an entry of its own.
        """
        pieces = [self.push(token) for token in (token_ids[:-1] if silent else token_ids)]
        if silent and token_ids:
            pieces.append("")
        if finished and (held := self.finish()):
            pieces.append(pieces.pop() + held if pieces else held)
        return pieces

    def push(self, token_id: int) -> str:
        """Return the text that this token makes certain; after a stop string it is always empty."""
        if self.stopped_by is not None:
            return ""
        self._count += 1
        text = self._step(token_id)
        if not self._stop or not text:
            return self._shown(text)
        pending = self._held + text
        if self._count <= self._min_tokens:
            self._early = len(pending)
        end = self._find_stop(pending)
        if end is not None:
            self._held = ""
            return self._shown(pending[:end])
        decided = len(pending) - self._undecided(pending)
        self._held = pending[decided:]
        self._early = max(0, self._early - decided)
        return self._shown(pending[:decided])

    def finish(self) -> str:
        """Return what was held back for a stop string that was not completed."""
        held, self._held = self._held, ""
        return self._shown(held)

    def _shown(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space, text = False, text[1:]
        return text

    def _step(self, token_id: int) -> str:
        """Return the text that one more token adds.

        Bytes that are not text appear as U+FFFD once they cannot become a character any more. The stream then starts
        over: otherwise it would decode all of them again for each further token.
        """
        if token_id in self._skipped:
            return ""
        self._textless.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id) or ""
        except Exception:  # tokenizers raises a bare Exception when earlier text changes under a later token
            text = self._restarted()
        if not text and len(self._textless) >= MOST_TEXTLESS:
            text = self._restarted()
        if not text:
            return ""
        while self._marks_to_drop and text.startswith(UNDECODABLE):
            self._marks_to_drop, text = self._marks_to_drop - 1, text[1:]
        self._marks_to_drop = 0
        if self._new_text and text:
            self._new_text = False
            self._drop_space = text.startswith(" ") and not self._decoded(self._textless).startswith(" ")
        self._last = self._textless[-1:]
        self._textless.clear()
        return text

    def _restarted(self) -> str:
        """Return the text that is waiting, after the last token that had text; further tokens follow it."""
        before, both = self._decoded(self._last), self._decoded(self._last + self._textless)
        text = both[len(before) :] if both.startswith(before) else self._decoded(self._textless)
        self._stream = self._primed(self._textless[-1:] if text else self._last, continues=True)
        if not text:
            self._textless.clear()
        return text

    def _primed(self, token_ids: list[int], *, continues: bool) -> DecodeStream:
        """Return a stream of the text that follows these tokens, without theirs.

        If their text ends within a character, the stream would show them, too: so it gets fewer of them, and the text
        of the rest is removed. If they begin within a character, some tokenizers lose all bytes that follow: so the
        first ones are left out. continues: whether a character that they begin may be completed.
        """
        for last in range(len(token_ids), 0, -1):
            for first in range(min(LONGEST_CHARACTER, last)):
                known = token_ids[first:last]
                if self._decoded(known).endswith(UNDECODABLE):
                    continue
                stream = DecodeStream(ids=known, skip_special_tokens=self._skip_special_tokens)
                if continues:
                    for token_id in token_ids[last:]:
                        stream.step(self._tokenizer, token_id)
                    whole = self._decoded(token_ids[first:])
                    self._marks_to_drop = len(whole) - len(whole.rstrip(UNDECODABLE))
                return stream
        return DecodeStream(skip_special_tokens=self._skip_special_tokens)

    def _decoded(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens))

    def _find_stop(self, pending: str) -> int | None:
        """Return where the text ends because of a stop string; None if it goes on.

        Of several stop strings the one that is complete first counts and, of those that end at the same character, the
        one named first, as in vLLM.
        """
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            at = pending.find(stop, max(0, self._early - len(stop) + 1))
            if at >= 0 and (best is None or at + len(stop) < best[0]):
                best = (at + len(stop), at, stop)
        if best is None:
            return None
        end, at, self.stopped_by = best
        return end if self._include_stop else at

    def _undecided(self, pending: str) -> int:
        """Return how many of the last characters could be the beginning of a stop string."""
        for length in range(min(self._longest_stop - 1, len(pending)), 0, -1):
            tail = pending[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0


class TokenTexts:
    """The texts of single tokens, cached, and detokenizers for answers; shared by all requests.

    skipped: texts of all tokens that `skip_special_tokens` skips.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder
        self.skipped = skipped_tokens(tokenizer)
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._texts: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = str(self._backend.decode([token_id], skip_special_tokens=False))
            self._texts[token_id] = text
        return text

    def detokenizer(self, params: RequestSampling, *, prime: Sequence[int] = (), new_text: bool = False) -> Detokenizer:
        """Return a detokenizer for one answer. prime, new_text: see `Detokenizer`."""
        return Detokenizer(
            self._backend,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
            skip_special_tokens=params.skip_special_tokens,
            prime=prime,
            new_text=new_text,
            skipped=self._special if params.skip_special_tokens else frozenset(),
        )
