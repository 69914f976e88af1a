"""How a request's tokens are chosen and its text is made."""

from __future__ import annotations

from collections.abc import Sequence

from engine.sampling_params import MAX_BAD_WORDS, MAX_BREAKERS, SamplingParams, bounded

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1000
"""The longest stop string, since that much text may be held back until it is decided."""


class RequestSampling(SamplingParams, kw_only=True, omit_defaults=True, frozen=True):
    """The engine's sampling parameters, and those that concern only the text of prompts and completions.

    Attributes:
        stop: Strings that end the completion; not part of the text unless include_stop_str_in_output.
        include_stop_str_in_output: Keep the stop string, or the stop token's text, at the end of the text.
        skip_special_tokens: Leave special tokens out of the text.
        bad_words: Texts that the completion must not contain, as far as their usual tokens go; they become
            bad_words_token_ids.
        dry_sequence_breakers: Texts that end a repetition, which become dry_sequence_breaker_ids; None means DRY's
            own list.
    """

    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    bad_words: tuple[str, ...] = ()
    dry_sequence_breakers: tuple[str, ...] | None = None

    def for_engine(self) -> SamplingParams:
        """Return the part that an engine, which knows only token ids, understands."""
        return SamplingParams(**{name: getattr(self, name) for name in SamplingParams.__struct_fields__})

    def validate(self) -> None:
        """Check all fields.

        Raises:
            ValueError: Names the first field that is out of range, its value, and what is allowed.
        """
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop holds {len(self.stop)} strings; allowed: at most {MAX_STOP_STRINGS}")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise ValueError(
                    f"stop holds a string of {len(text)} characters; allowed: from 1 to {MAX_STOP_CHARACTERS}"
                )
        _require_texts("bad_words", self.bad_words, MAX_BAD_WORDS)
        _require_texts("dry_sequence_breakers", self.dry_sequence_breakers or (), MAX_BREAKERS)
        SamplingParams.validate(self)


def _require_texts(name: str, texts: Sequence[str], most: int) -> None:
    bounded(name, len(texts), "texts", 0, most)
    for text in texts:
        bounded(name, len(text), "characters in a text", 1, MAX_STOP_CHARACTERS)
