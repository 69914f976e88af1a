"""A request's way through any engine: render, tokenise, place images, check limits, generate, make text, find stops.

Engines know nothing of a request but its token ids and images (see `handlers.backends.base.Engine`).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from engine.messages import Logprobs
from engine.sampling_params import MAX_BAD_WORD_TOKENS
from handlers.backends.adapters import AdapterStore
from handlers.backends.base import (
    BackendStats,
    Capabilities,
    Engine,
    EngineRequest,
    Health,
    PromptModel,
    TokenOutput,
    TokenStream,
)
from handlers.deltas import Delta, FinishReason, PositionLogprobs, PromptStats, TokenizedPrompt, TokenLogprob
from handlers.errors import ContextExceeded, InvalidParameter, InvalidRequest, stopping
from handlers.grammars.compiler import GrammarCompiler
from handlers.prompts.renderer import RenderedPrompt
from handlers.prompts.tokenizer import Detokenizer, TokenTexts
from handlers.request import (
    MOST_TOKEN_IDS,
    ChatPrompt,
    Constraint,
    GenerationRequest,
    Prompt,
    RequestSampling,
    TextPrompt,
    media_parts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")

LOWEST_LOGPROB = -9999.0
"""OpenAI's and vLLM's number for a probability of zero, since JSON has no infinity."""

LONG_PROMPT_BYTES = 20_000
"""Prompts of larger bodies, images not counted, are rendered and tokenised in a thread, not on the event loop."""

MANY_MESSAGES = 64
"""Conversations of more messages are rendered in a thread, too."""

PRIMING_TOKENS = 8
"""The number of a prompt's last tokens that decide how the text of an answer begins."""

DRY_BREAKERS = ("\n", ":", '"', "*")
"""DRY's own sequence breakers, for requests that name none."""

MANY_CHARACTERS = 2000
"""Bad words and sequence breakers of more characters together are tokenised in a thread, not on the event loop."""

_CHARACTERS_PER_TOKEN = 32
"""Far more than the tokens of any text have on average."""

_FEWEST = 2**17
"""The limit for models with a short context. While a prompt is tokenised, each character takes about 210 bytes."""


class Pipeline:
    """One loaded engine, and everything between it and the requests.

    Attributes:
        capabilities: What requests may ask for.
    """

    def __init__(self, engine: Engine[Any], compile_seconds: float) -> None:
        """Put a pipeline in front of an engine, which `close` closes.

        Args:
            engine: Loaded.
            compile_seconds: The time limit for compiling one constraint.
        """
        model, context = engine.model, engine.capabilities.max_model_len
        model.renderer.longest = longest_prompt(context)
        self._engine = engine
        self._model = model
        self._token_texts = TokenTexts(model.tokenizer)
        self._compiler = None if model.vocabulary is None else GrammarCompiler(model.vocabulary, compile_seconds)
        self._closed = False
        self.capabilities: Capabilities = dataclasses.replace(
            engine.capabilities,
            image_placeholder=model.renderer.placeholder or None,
            special_token_ids=frozenset(model.tokenizer.all_special_ids),
            special_tokens=self._token_texts.skipped,
            chat_templates=model.renderer.variables,
        )

    @property
    def adapters(self) -> AdapterStore | None:
        """The store that changes adapters while the engine serves; None if none can be changed."""
        return self._engine.adapters

    async def generate(self, request: GenerationRequest) -> Generation:
        """Start a request on the engine. Its images are loaded already, and released as soon as they are prepared.

        Every mistake of the client is reported here, before a reply has begun.

        Raises:
            ServingError: The request is refused, or the engine cannot take it.
        """
        if self._closed:
            raise stopping()
        model, longest = self._model, self.capabilities.max_model_len
        constraint, grammar = await self.compiled(request.constraint)
        rendered = await self._rendered(request)
        token_ids, parts = rendered.token_ids, list(request.images())
        if parts:
            require_known(request, model.vocab_size, model.renderer.image_token_id)
        else:
            token_ids = checked_tokens(request, token_ids, longest, model.vocab_size)
        # A request that is refused in any case is refused before its images cost anything. Whether the prompt is too
        # long together with its images is checked once their length is known.
        params = checked_sampling(request, len(token_ids), longest, model.vocab_size, images_follow=bool(parts))
        params = await self._tokenise_words(params)
        # Greedy choices are identical, so a single one is generated for all of them.
        copies = request.n if params.greedy else 1
        asked = EngineRequest(
            request.request_id,
            params,
            request.n // copies,
            constraint,
            grammar,
            request.adapter,
            request.model,
            request.priority,
        )
        prompt = await self._engine.prepare(token_ids, parts, asked)
        try:
            if parts:
                most = fitting_max_tokens(request, len(prompt.token_ids), longest)
                if most != params.max_tokens:
                    asked.params = msgspec.structs.replace(params, max_tokens=most)
            stats = PromptStats(
                prompt_tokens=len(prompt.token_ids),
                image_tokens=sum(length for _, length in prompt.images),
                prompt_token_ids=prompt.token_ids,
                prompt_text=rendered.text,
            )
            texts = texts_of(request, params, prompt.token_ids, asked.n, self._token_texts)
        except BaseException:
            prompt.discard()
            raise
        stream = await self._engine.generate(prompt, asked)
        return Generation(stream, stats, params, texts, copies, self._token_texts)

    async def compiled(self, constraint: Constraint | None) -> tuple[Constraint | None, str | None]:
        """Complete a constraint with the model's defaults and compile it.

        Returns:
            The constraint and its grammar; the grammar is None if the engine compiles constraints itself.

        Raises:
            ServingError: As `GrammarCompiler.compile` does.
        """
        if constraint is None or self._compiler is None:
            return constraint, None
        if constraint.whitespace_pattern is None:
            constraint = dataclasses.replace(constraint, whitespace_pattern=self._model.json_whitespace)
        return constraint, await self._compiler.compile(constraint)

    async def tokenize(self, prompt: Prompt) -> TokenizedPrompt:
        """Return the tokens that `generate` would give to the model. The prompt's loaded images are released here.

        The prompt's length is not checked.

        Raises:
            InvalidRequest: The prompt cannot be rendered.
            Unavailable: The engine cannot prepare it now.
        """
        model, parts = self._model, list(media_parts(prompt))
        rendered = await self._in_thread(partial(model.renderer.render, prompt, spans=True))
        placed: list[list[int]] = []
        if parts:
            prepared = await self._engine.prepare(rendered.token_ids, parts, None)
            placed = [prepared.token_ids[at : at + length] for at, length in prepared.images]
            prepared.discard()
        return await self._in_thread(partial(_tokenized, rendered, model, placed))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, including special ones. Raises InvalidRequest for an id outside the vocabulary."""
        return await self._in_thread(partial(_detokenized, token_ids, self._model))

    def health(self) -> Health:
        """Return whether the engine can generate now."""
        return self._engine.health()

    def stats(self) -> BackendStats:
        """Return the engine's counts."""
        return self._engine.stats()

    async def close(self) -> None:
        """Abort what is running, and close the engine. Never raises."""
        self._closed = True
        if self._compiler is not None:
            await self._compiler.close()
        await self._engine.close()

    async def _rendered(self, request: GenerationRequest) -> RenderedPrompt:
        """Render the prompt, in a thread if that may take long.

        A request's own template may take long however short its body is.
        """
        prompt, renderer = request.prompt, self._model.renderer
        trusted = isinstance(prompt, TextPrompt) or prompt.template is None
        short = request.text_bytes <= LONG_PROMPT_BYTES and (
            isinstance(prompt, TextPrompt) or len(prompt.messages) <= MANY_MESSAGES
        )
        return renderer.render(prompt) if trusted and short else await self._in_thread(renderer.render, prompt)

    async def _tokenise_words(self, params: RequestSampling) -> RequestSampling:
        model = self._model
        work = partial(tokenise_words, params, model.tokenizer, words=not model.spells_words)
        return work() if count_characters(params) <= MANY_CHARACTERS else await self._in_thread(work)

    async def _in_thread(self, work: Callable[..., T], *given: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._model.threads, work, *given)


class Generation:
    """The choices of one request, as text. Iterate to the end or call `aclose`, which aborts what is still running.

    Attributes:
        stats: Counts of the prompt; complete once the first delta has arrived.
    """

    def __init__(
        self,
        stream: TokenStream,
        stats: PromptStats,
        params: RequestSampling,
        texts: list[Detokenizer],
        copies: int,
        token_text: Callable[[int], str],
    ) -> None:
        """Make text of an engine's tokens.

        Args:
            stream: The tokens of all choices.
            stats: Completed as outputs arrive.
            params: As the engine got them.
            texts: A detokenizer for each choice that the engine generates.
            copies: How many identical choices of the request each of them stands for.
            token_text: Returns the text of a single token, for log probabilities.
        """
        self.stats = stats
        self._stream = stream
        self._silent_ends = not params.include_stop_str_in_output
        self._texts = texts
        self._copies = copies
        self._open = set(range(len(texts)))
        self._token_text = token_text

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            async for output in self._stream:
                if output.index not in self._open:
                    continue
                await self._note(output)
                for delta in self._deltas(output):
                    yield delta
        finally:
            await self._stream.aclose()

    async def aclose(self) -> None:
        """Abort within one engine step. Safe to call twice and after the end."""
        self._open.clear()
        await self._stream.aclose()

    async def _note(self, output: TokenOutput) -> None:
        stats = self.stats
        stats.queued = stats.queued or output.queued
        if output.cached_tokens > stats.cached_tokens:
            stats.cached_tokens = output.cached_tokens
        if output.prompt_logprobs is not None and stats.prompt_logprobs is None:
            await asyncio.to_thread(self._note_prompt_logprobs, output.prompt_logprobs)

    def _note_prompt_logprobs(self, entries: Sequence[Logprobs | None]) -> None:
        if self.stats.prompt_token_ids:
            self.stats.first_token_text = self._token_text(self.stats.prompt_token_ids[0])
        self.stats.prompt_logprobs = [None if entry is None else self._position(entry) for entry in entries]

    def _deltas(self, output: TokenOutput) -> list[Delta]:
        """Return one delta, or one for each of the identical choices."""
        text, token_ids, logprobs = self._texts[output.index], output.token_ids, output.logprobs
        pieces = text.pieces(
            token_ids, silent=output.by_token and self._silent_ends, finished=output.finish is not None
        )
        finish: FinishReason | None = output.finish
        stop_reason: int | str | None = output.stop_token
        by_token = output.by_token
        if text.stopped_by is not None:
            if finish is None:
                self._stream.abort(output.index)
            finish, stop_reason, by_token = "stop", text.stopped_by, False
        if finish is not None:
            self._open.discard(output.index)
        positions = None if logprobs is None else [self._position(entry) for entry in logprobs]
        return [
            Delta(
                index=output.index + copy,
                token_ids=list(token_ids) if copy else token_ids,
                text=pieces[0] if len(pieces) == 1 else "".join(pieces),
                pieces=pieces,
                logprobs=positions,
                finish_reason=finish,
                stop_reason=stop_reason,
                eos=by_token and stop_reason is None,
            )
            for copy in range(self._copies)
        ]

    def _position(self, entry: Logprobs) -> PositionLogprobs:
        chosen, *top = (
            TokenLogprob(token, self._token_text(token), logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB, rank)
            for token, logprob, rank in zip(entry.token_ids, entry.logprobs, entry.ranks, strict=True)
        )
        return PositionLogprobs(chosen, tuple(top))


def texts_of(
    request: GenerationRequest,
    params: RequestSampling,
    token_ids: Sequence[int],
    count: int,
    token_texts: TokenTexts,
) -> list[Detokenizer]:
    """Return a detokenizer for each of `count` choices. token_ids: those of the prompt."""
    # The answer to a chat begins a new text, while a completion continues its prompt. A constrained answer keeps a
    # leading space, because its grammar has counted it.
    new_text = isinstance(request.prompt, ChatPrompt) and not request.prompt.continue_final_message
    new_text = new_text and request.constraint is None
    prime = token_ids[-PRIMING_TOKENS:]
    return [token_texts.detokenizer(params, prime=prime, new_text=new_text) for _ in range(count)]


def _tokenized(rendered: RenderedPrompt, model: PromptModel, placed: Sequence[Sequence[int]]) -> TokenizedPrompt:
    """Describe the tokens of a prompt. CPU-bound.

    Args:
        rendered: The prompt with one image token for each image.
        model: The engine's model.
        placed: For each image, the tokens that replace its image token.
    """
    token_ids, spans = rendered.token_ids, rendered.spans or [(0, 0)] * len(rendered.token_ids)
    if placed:
        waiting = iter(placed)
        marked = zip(token_ids, spans, strict=True)
        image = model.renderer.image_token_id
        groups = [(next(waiting) if token == image else (token,), span) for token, span in marked]
        token_ids = [token for tokens, _ in groups for token in tokens]
        spans = [span for tokens, span in groups for _ in tokens]
    pieces = list(model.tokenizer.convert_ids_to_tokens(token_ids))
    return TokenizedPrompt(rendered.text, token_ids, pieces, spans)


def _detokenized(token_ids: Sequence[int], model: PromptModel) -> str:
    """CPU-bound. Raises InvalidRequest for an id that the tokenizer does not know."""
    size = len(model.tokenizer)
    if (bad := next((token for token in token_ids if not 0 <= token < size), None)) is not None:
        raise InvalidRequest(
            f"tokens holds an id that is not in the vocabulary of {size} tokens: {str(bad)[:40]}",
            param="tokens",
        )
    # Decoded as a batch, because that lets other threads run.
    (text,) = model.tokenizer.backend_tokenizer.decode_batch([list(token_ids)], skip_special_tokens=False)
    return str(text)


def longest_prompt(max_model_len: int) -> int:
    """Return the number of characters, or of a client's own token ids, beyond which a prompt is not processed.

    Tokenising a body of 60 MB would take a thread a minute and the process 8 GB, only to find that the tokens are too
    many.
    """
    return max(_FEWEST, _CHARACTERS_PER_TOKEN * max_model_len)


def require_known(request: GenerationRequest, vocab_size: int, image_token_id: int | None = None) -> None:
    """Raise InvalidRequest for token ids from the client that the model does not know.

    image_token_id may lie outside the vocabulary.
    """
    prompt = request.prompt
    if not isinstance(prompt, TextPrompt) or prompt.token_ids is None:
        return
    bad = next((t for t in prompt.token_ids if not 0 <= t < vocab_size and t != image_token_id), None)
    if bad is not None:
        raise InvalidRequest(
            f"the prompt holds the token id {str(bad)[:40]}; this model's are 0 to {vocab_size - 1}",
            param="prompt",
        )


def checked_tokens(request: GenerationRequest, token_ids: list[int], max_model_len: int, vocab_size: int) -> list[int]:
    """Return the tokens of a prompt without images, truncated as the request says. Raises as `require_known`.

    `checked_sampling`, which counts the tokens, refuses whatever is longer than the context.
    """
    if request.truncate_prompt_tokens is None and len(token_ids) >= max_model_len:
        return token_ids
    require_known(request, vocab_size)
    most = request.truncate_prompt_tokens
    if most is None:
        return token_ids
    if most == -1:
        most = max_model_len - (request.sampling.max_tokens or 1)
        # A default leaves the prompt half of the context at least.
        most = max(1, most, max_model_len // 2 if request.max_tokens_is_default else 1)
    return token_ids[:most] if request.truncation_side == "right" else token_ids[-most:]


def fitting_max_tokens(
    request: GenerationRequest, used: int, max_model_len: int, *, images_follow: bool = False
) -> int | None:
    """Return the `max_tokens` with which an answer fits behind the `used` tokens of its prompt.

    images_follow: the tokens of images are still to be counted, so that a long answer is refused only then. Raises
    InvalidRequest if the prompt is empty, or if it or the answer does not fit.
    """
    wanted = request.sampling.max_tokens
    if used == 0:
        raise InvalidRequest("the prompt is empty")
    if used >= max_model_len:
        raise ContextExceeded(prompt_tokens=used, max_tokens=None, context=max_model_len)
    if wanted is None or used + wanted <= max_model_len:
        return wanted
    if not (request.max_tokens_is_default or images_follow):
        raise ContextExceeded(prompt_tokens=used, max_tokens=wanted, context=max_model_len)
    return max_model_len - used


def checked_sampling(
    request: GenerationRequest,
    used: int,
    max_model_len: int,
    vocab_size: int,
    *,
    images_follow: bool = False,
) -> RequestSampling:
    """Return the sampling parameters to use. The arguments are those of `fitting_max_tokens`.

    Raises:
        InvalidRequest: The engine would have to refuse them.
    """
    params = request.sampling
    most = fitting_max_tokens(request, used, max_model_len, images_follow=images_follow)
    if most != params.max_tokens:
        params = msgspec.structs.replace(params, max_tokens=most)
    for name, ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
        if len(ids) > MOST_TOKEN_IDS:
            raise InvalidParameter(name, f"names {len(ids)} tokens; allowed: {MOST_TOKEN_IDS}")
        if (bad := next((t for t in ids if not 0 <= t < vocab_size), None)) is not None:
            raise InvalidParameter(name, f"names a token that is not in the vocabulary: {str(bad)[:40]}")
    for name, ids in (
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("bad_words_token_ids", tuple(token for run in params.bad_words_token_ids for token in run)),
        ("dry_sequence_breaker_ids", params.dry_sequence_breaker_ids),
    ):
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            bad = max(ids) if min(ids) >= 0 else min(ids)
            raise InvalidParameter(name, f"names a token that is not in the vocabulary: {str(bad)[:40]}")
    try:
        params.validate()
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    return params


def count_characters(params: RequestSampling) -> int:
    """Return how many characters of bad words and sequence breakers have to be tokenised."""
    return sum(map(len, params.bad_words)) + sum(map(len, params.dry_sequence_breakers or ()))


def tokenise_words(
    params: RequestSampling, tokenizer: PreTrainedTokenizerFast, *, words: bool = True
) -> RequestSampling:
    """Return the parameters with token ids instead of the words; unchanged if there are none. words: also bad_words.

    A bad word is matched as it is tokenised at the beginning of a text and after a space (as in vLLM), a breaker by
    the last token that it ends with inside a text (as DRY's author does).

    Raises:
        InvalidRequest: There are too many words, or they are too long.
    """
    if params.bad_words and words:
        runs = dict.fromkeys(params.bad_words_token_ids)
        for word in params.bad_words:
            for spelling in (word.lstrip(), f" {word.lstrip()}"):
                if run := tuple(_encode(tokenizer, spelling)):
                    runs[run] = None
        if (total := sum(map(len, runs))) > MAX_BAD_WORD_TOKENS:
            raise InvalidParameter(
                "bad_words",
                f"are {total} tokens, as they begin a text and after a space; allowed: {MAX_BAD_WORD_TOKENS} in all",
            )
        params = msgspec.structs.replace(params, bad_words=(), bad_words_token_ids=tuple(runs))
    texts = params.dry_sequence_breakers
    if params.dry_multiplier > 0.0 and (texts or (texts is None and not params.dry_sequence_breaker_ids)):
        ends = [_encode(tokenizer, f"a{text}")[-1:] for text in (DRY_BREAKERS if texts is None else texts)]
        ids = {*params.dry_sequence_breaker_ids, *(token for end in ends for token in end)}
        params = msgspec.structs.replace(
            params, dry_sequence_breakers=None, dry_sequence_breaker_ids=tuple(sorted(ids))
        )
    return params


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
