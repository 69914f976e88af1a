"""Output that matches a grammar: computes which tokens may come next, for all such completions of a step at once.

A grammar is llguidance's: Lark, or JSON that holds JSON schemas or regular expressions. It is compiled
against the model's own tokenizer, so every token that may be chosen continues a text that the grammar allows.
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
"""Limits on the cost of a grammar: to compile, in one step, and in memory."""

MOST_COMPILED = 32
"""Number of most recently used grammars that are kept compiled."""

MOST_STEPS = 2000
"""Number of steps after which a grammar is compiled again.

All guides of a grammar share the states that their texts lead to, which `LIMITS` bounds. Otherwise a grammar
would become unusable once some completions had filled them up.
"""

STACK_BYTES = 64 << 20
"""Stack of the compiling thread, for grammars so deep that they just compiled on the usual stack of the
process that checked them."""

MOST_REASON_CHARACTERS = 300
_NO_TEXT = ("NoExtension", "NoExtensionBias")
"""llguidance's messages where a grammar allows nothing."""


class GrammarError(Exception):
    """The grammar cannot be used; the message is for the client."""


class _Compiled:
    """A compiled grammar before any text.

    Attributes:
        matcher: llguidance's matcher, which is only copied.
        steps: Number of steps that its copies have taken together.
    """

    __slots__ = ("matcher", "steps")

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self.steps = 0


class Guide:
    """Position of one completion in its grammar; it only advances.

    Attributes:
        matcher: llguidance's matcher.
        reason: Why the completion cannot continue; None while it can.
    """

    __slots__ = ("_origin", "matcher", "reason")

    def __init__(self, origin: _Compiled) -> None:
        self.matcher = origin.matcher.deep_copy()
        self.reason: str | None = None
        self._origin = origin

    @property
    def ended(self) -> bool:
        """Whether the completion is whole and nothing can follow it."""
        return self.reason is None and self.matcher.is_stopped()

    def accept(self, token_id: int) -> None:
        """Advance by the chosen token, or set `reason` if the grammar does not allow it."""
        if not self.ended and self.reason is None and not self.matcher.consume_token(token_id):
            self.fail(_reason(self.matcher))

    def step(self) -> None:
        """Count a step, in which the allowed tokens are computed."""
        self._origin.steps += 1

    def fail(self, reason: str) -> None:
        """End the completion, and have the grammar compiled again for others.

        Another completion with this grammar may succeed, but not with the states that this one has filled up.
        """
        self.reason = reason
        self._origin.steps = MOST_STEPS


class Guidance:
    """Compiles grammars for one vocabulary and computes what they allow. Only `build` may run in another thread."""

    def __init__(self, vocabulary: Vocabulary, *, most_compiled: int = MOST_COMPILED) -> None:
        """Prepare the tokenizer.

        Raises:
            GrammarError: The tokenizer's tokens cannot be represented as bytes.
        """
        self._most_compiled = most_compiled
        try:
            self._tokenizer = LLTokenizer(
                vocabulary.tokenizer,
                n_vocab=max(vocabulary.size, vocabulary.tokens),
                eos_token=list(vocabulary.eos_token_ids) or None,
            )
        except BaseException as error:  # a panic in Rust is not an Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise GrammarError(f"this tokenizer does not support constrained output: {error}") from error
        self._num_words = (self._tokenizer.vocab_size + 31) // 32
        self.eos_token_ids = tuple(self._tokenizer.eos_tokens)
        self._permitted = np.full(self._num_words, 0xFFFFFFFF, np.uint32)
        _remove(self._permitted, (*vocabulary.forbidden, *range(vocabulary.size, self._num_words * 32)))
        self._executor = LLExecutor(min(4, usable_cores()))
        self._compiled: OrderedDict[str, _Compiled] = OrderedDict()

    def build(self, grammar: str, count: int) -> list[Guide]:
        """Create guides for `count` completions.

        Raises:
            GrammarError: The grammar cannot be compiled.
        """
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
        """Compute the tokens that may come next, [len(guides), words].

        A guide with a `reason` gets none. This sets `reason` where the grammar has become too complex, or
        allows no token that may be used.
        """
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
                guide.reason = "the grammar leads to a state that none of this model's tokens can continue"
            else:
                continue
            mask[:] = 0
        return masks

    def constrain(self, guides: Sequence[Guide], states: Sequence[SamplingState]) -> None:
        """Give each state the mask from which the sampler chooses; it is empty where the guide's `reason` is set.

        While a completion is shorter than min_tokens, or with ignore_eos, it ends only where the grammar does.
        """
        try:
            for mask, state in zip(self.fill(guides), states, strict=True):
                ending_ids: list[int] = state.ending_ids.tolist() if state.too_short else []
                if state.too_short or state.params.ignore_eos:
                    ending_ids += self.eos_token_ids
                if ending_ids:
                    others = mask.copy()
                    _remove(others, ending_ids)
                    if others.any():
                        mask = others
                state.grammar_mask = mask
        except BaseException as error:  # a panic in Rust is not an Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            logger.exception("what the grammars of %d answers allow could not be computed", len(guides))
            for guide in guides:
                guide.reason = guide.reason or "what the grammar allows could not be computed"


@dataclass(slots=True)
class Built:
    """A request whose grammar has been compiled, or has failed to compile.

    Attributes:
        add: The request.
        guides: One for each completion; empty where compiling failed.
        reason: Why the grammar cannot be used; None where it can.
        aborted: Ids of completions that are no longer wanted.
    """

    add: Add
    guides: list[Guide]
    reason: str | None
    aborted: set[int]


class GuideBuilder:
    """Compiles grammars in a thread while the steps of other requests continue.

    Requests come out as `Built`, in the order in which they were started. All methods are called by the
    engine's own thread.
    """

    def __init__(self, guidance: Guidance | None, done: Callable[[Built], None]) -> None:
        """Create a builder; its thread starts with the first request.

        Args:
            guidance: None where output cannot be constrained.
            done: Called in the compiling thread; its argument must then be passed to `take`.
        """
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
        """Mark these completions as unwanted, if they belong to a request that is waiting here."""
        for request_id in request_ids:
            for built in self._waiting.values():
                if request_id in built.add.choice_ids:
                    built.aborted.add(request_id)

    def take(self, built: Built) -> None:
        """Remove the request from those that are waiting."""
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
            except BaseException:  # a panic in Rust is not an Exception, and this thread must continue
                logger.exception("a grammar could not be compiled")
                built.reason = "the grammar cannot be compiled"
            self._done(built)


def _remove(words: Words, token_ids: Sequence[int]) -> None:
    tokens = np.array([token for token in token_ids if 0 <= token < len(words) * 32], np.int64)
    np.bitwise_and.at(words, tokens >> 5, ~(np.uint32(1) << (tokens & 31).astype(np.uint32)))


def _reason(matcher: LLMatcher) -> str:
    """Return llguidance's message on one line."""
    text = " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())
    if text in _NO_TEXT:
        return "no text can satisfy it: in a schema, a $ref may lead back to itself"
    text = text.replace("Unimplemented keys:", "keywords of JSON Schema that are not supported:")
    return text if len(text) <= MOST_REASON_CHARACTERS else f"{text[:MOST_REASON_CHARACTERS]}…"
