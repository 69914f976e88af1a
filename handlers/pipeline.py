"""A request's way through any engine: render, tokenise, place images, check limits, generate, make text, find stops.

Engines know nothing of a request but its token ids and images (see `handlers.backends.base.Engine`).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec

from engine.messages import Logprobs
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
from handlers.errors import InvalidRequest, stopping
from handlers.grammars.compiler import GrammarCompiler
from handlers.prompts.renderer import RenderedPrompt
from handlers.prompts.tokenizer import Detokenizer, TokenTexts
from handlers.request import ChatPrompt, Constraint, GenerationRequest, Prompt, RequestSampling, TextPrompt, media_parts
from handlers.request_checks import (
    checked_sampling,
    checked_tokens,
    fitting_max_tokens,
    has_many_words,
    longest_prompt,
    require_known,
    tokenise_words,
)

T = TypeVar("T")

LOWEST_LOGPROB = -9999.0
"""OpenAI's and vLLM's number for a probability of zero, since JSON has no infinity."""

LONG_PROMPT_BYTES = 20_000
"""Prompts of larger bodies, images not counted, are rendered and tokenised in a thread, not on the event loop."""

MANY_MESSAGES = 64
"""Conversations of more messages are rendered in a thread, too."""

PRIMING_TOKENS = 8
"""The number of a prompt's last tokens that decide how the text of an answer begins."""


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
        return await self._in_thread(work) if has_many_words(params) else work()

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
    request: GenerationRequest, params: RequestSampling, token_ids: Sequence[int], count: int, token_texts: TokenTexts
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
            f"tokens holds an id that is not in the vocabulary of {size} tokens: {str(bad)[:40]}", param="tokens"
        )
    # Decoded as a batch, because that lets other threads run.
    (text,) = model.tokenizer.backend_tokenizer.decode_batch([list(token_ids)], skip_special_tokens=False)
    return str(text)
