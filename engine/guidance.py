"""Answers that match a grammar: which tokens may come next, for all constrained answers of a step in one call.

A grammar is llguidance's: Lark, or JSON that holds JSON schemas or expressions. It is compiled against the
model's own tokenizer, so that every token that may be chosen continues a text that the grammar allows.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from engine.config import Vocabulary
from engine.machine import usable_cores
from engine.messages import Add

if TYPE_CHECKING:
    from engine.sampling_state import SamplingState

logger = logging.getLogger(__name__)

Words = npt.NDArray[np.uint32]
"""A set of tokens: bit `t % 32` of word `t // 32` is token t."""

LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=200_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""Bound what a grammar may cost: to compile, in one step, and in memory."""

MOST_COMPILED = 32
"""Grammars kept compiled, the ones used last."""

MOST_STEPS = 2000
"""Taken with what was compiled once; then it is compiled anew. Its copies share the states that their texts lead to,
which `LIMITS` bounds: without this, a grammar would be of no use to anybody once some answers had filled them up."""

STACK_BYTES = 64 << 20
"""For grammars nested so deeply that they just compiled on the usual stack of the process that checked them."""

MOST_REASON_CHARACTERS = 300
_NO_TEXT = ("NoExtension", "NoExtensionBias")
"""What llguidance says instead of a sentence where a grammar allows nothing."""


class GrammarError(Exception):
    """The grammar cannot be used; the message is for the client."""


class _Compiled:
    """A grammar as it was before any text. steps: how many its copies have taken together."""

    __slots__ = ("matcher", "steps")

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self.steps = 0


class Guide:
    """Where one answer stands in its grammar; it advances with the answer and never goes back.

    reason: why the answer cannot go on, None while it can.
    """

    __slots__ = ("_origin", "matcher", "reason")

    def __init__(self, origin: _Compiled) -> None:
        self.matcher = origin.matcher.deep_copy()
        self.reason: str | None = None
        self._origin = origin

    @property
    def ended(self) -> bool:
        """The answer is whole and nothing can follow it."""
        return self.reason is None and self.matcher.is_stopped()

    def accept(self, token_id: int) -> None:
        """The token was chosen; sets `reason` if the grammar does not allow it."""
        if not self.ended and self.reason is None and not self.matcher.consume_token(token_id):
            self.fail(_reason(self.matcher))

    def step(self) -> None:
        """What may come next is asked for."""
        self._origin.steps += 1

    def fail(self, reason: str) -> None:
        """The answer cannot go on. Another one with this grammar may, but not with what this one has filled up."""
        self.reason = reason
        self._origin.steps = MOST_STEPS


class Guidance:
    """Compiles grammars for one vocabulary and says what they allow. Only `build` may run in another thread."""

    def __init__(self, vocabulary: Vocabulary, *, most_compiled: int = MOST_COMPILED) -> None:
        """Raises GrammarError for a tokenizer whose tokens cannot be told as bytes."""
        self._most_compiled = most_compiled
        try:
            self._tokenizer = LLTokenizer(
                vocabulary.tokenizer,
                n_vocab=max(vocabulary.size, vocabulary.tokens),
                eos_token=list(vocabulary.eos_token_ids) or None,
            )
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise GrammarError(f"the tokenizer is of a kind that cannot be constrained: {error}") from error
        self._num_words = (self._tokenizer.vocab_size + 31) // 32
        self.eos_token_ids = tuple(self._tokenizer.eos_tokens)
        self._permitted = np.full(self._num_words, 0xFFFFFFFF, np.uint32)
        _remove(self._permitted, (*vocabulary.forbidden, *range(vocabulary.size, self._num_words * 32)))
        self._executor = LLExecutor(min(4, usable_cores()))
        self._compiled: OrderedDict[str, _Compiled] = OrderedDict()

    def build(self, grammar: str, count: int) -> list[Guide]:
        """Guides for `count` answers. Raises GrammarError."""
        first = self._compiled.get(grammar)
        if first is None or first.steps >= MOST_STEPS:
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
            if matcher.is_error():
                raise GrammarError(_reason(matcher))
            first = self._compiled[grammar] = _Compiled(matcher)
        self._compiled.move_to_end(grammar)
        if len(self._compiled) > self._most_compiled:
            self._compiled.popitem(last=False)
        return [Guide(first) for _ in range(count)]

    def fill(self, guides: Sequence[Guide]) -> Words:
        """The tokens that may come next, [len(guides), words]: none for a guide whose `reason` is set, which this
        does where the grammar has become too complex or allows no token that may be used."""
        masks = np.zeros((len(guides), self._num_words), np.uint32)
        going = [(guide.matcher, row) for row, guide in enumerate(guides) if guide.reason is None]
        if going:
            self._executor.unsafe_compute_mask_ptr(going, masks.ctypes.data, masks.shape[1] * 4, len(masks))
        masks &= self._permitted
        for guide, mask in zip(guides, masks, strict=True):
            if guide.reason is not None:
                continue
            guide.step()
            if guide.matcher.is_error():
                guide.fail(_reason(guide.matcher))
            elif not mask.any():
                guide.reason = "the grammar leads to a place from which this model's tokens do not go on"
            else:
                continue
            mask[:] = 0
        return masks

    def constrain(self, guides: Sequence[Guide], states: Sequence[SamplingState]) -> None:
        """Give each state the tokens among which the sampler is to choose; none where `reason` is set.

        While an answer is shorter than min_tokens, or with ignore_eos, it ends only where the grammar does.
        """
        for mask, state in zip(self.fill(guides), states, strict=True):
            enders: list[int] = state.enders.tolist() if state.too_short else []
            if state.too_short or state.params.ignore_eos:
                enders += self.eos_token_ids
            if enders:
                others = mask.copy()
                _remove(others, enders)
                if others.any():
                    mask = others
            state.grammar_mask = mask


@dataclass(slots=True)
class Built:
    """A request whose grammar is compiled, or cannot be: `reason` says why. Its aborted answers are listed."""

    add: Add
    guides: list[Guide]
    reason: str | None
    aborted: set[int]


class GuideBuilder:
    """Requests in, `Built` ones out, in the same order. All methods belong to the engine's own thread."""

    def __init__(self, guidance: Guidance | None, done: Callable[[Built], None]) -> None:
        """done: called in the building thread; what it is given is then to be `take`n."""
        self._guidance = guidance
        self._done = done
        self._inbox: queue.SimpleQueue[Built] = queue.SimpleQueue()
        self._waiting: dict[int, Built] = {}
        self._thread: threading.Thread | None = None

    def start(self, add: Add) -> None:
        built = Built(add, [], None, set())
        self._waiting[add.request_id] = built
        if self._thread is None:
            before = threading.stack_size(STACK_BYTES)
            self._thread = threading.Thread(target=self._run, daemon=True, name="grammars")
            self._thread.start()
            threading.stack_size(before)
        self._inbox.put(built)

    def abort(self, request_ids: Iterable[int]) -> None:
        """Remember that these answers, where they belong to a request that waits here, are not wanted."""
        for request_id in request_ids:
            for built in self._waiting.values():
                if request_id in built.add.answer_ids:
                    built.aborted.add(request_id)

    def take(self, built: Built) -> None:
        """The request waits no more."""
        del self._waiting[built.add.request_id]

    def _run(self) -> None:
        while True:
            built = self._inbox.get()
            try:
                if self._guidance is None:
                    raise GrammarError("this model's answers cannot be constrained")
                if len(built.aborted) < len(built.add.seeds):
                    built.guides = self._guidance.build(built.add.grammar or "", len(built.add.seeds))
            except GrammarError as error:
                built.reason = str(error)
            except BaseException:  # a panic in Rust is no Exception, and this thread must go on
                logger.exception("a grammar could not be compiled")
                built.reason = "the grammar cannot be compiled"
            self._done(built)


def _remove(words: Words, token_ids: Sequence[int]) -> None:
    tokens = np.array([token for token in token_ids if 0 <= token < len(words) * 32], np.int64)
    np.bitwise_and.at(words, tokens >> 5, ~(np.uint32(1) << (tokens & 31).astype(np.uint32)))


def _reason(matcher: LLMatcher) -> str:
    """llguidance's message, on one line."""
    text = " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())
    if text in _NO_TEXT:
        return "no text can satisfy it: in a schema, a $ref may lead back to itself"
    text = text.replace("Unimplemented keys:", "keywords of JSON Schema that are not supported:")
    return text if len(text) <= MOST_REASON_CHARACTERS else f"{text[:MOST_REASON_CHARACTERS]}…"
