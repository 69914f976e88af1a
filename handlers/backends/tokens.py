"""Prompts to tokens and tokens to text for clients that ask for nothing else; the same for every backend."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING

from handlers.backends.base import TokenizedPrompt
from handlers.errors import InvalidRequest
from handlers.prompts.detokenizer import Detokenizer
from handlers.prompts.renderer import PromptRenderer, RenderedPrompt
from handlers.request import ChatPrompt, GenerationRequest, TextPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from engine.sampling_params import SamplingParams

LONG_PROMPT_BYTES = 20_000
"""Prompts of larger bodies, pictures not counted, are rendered and tokenised in a thread, not on the event loop."""

MANY_MESSAGES = 64
"""More are rendered in a thread, too."""

PRIMING_TOKENS = 8
"""Last tokens of a prompt that say how an answer's text begins."""


async def rendered_prompt(
    renderer: PromptRenderer, request: GenerationRequest, threads: Executor
) -> RenderedPrompt:
    """A template of the request's own may take long however short its body is."""
    prompt = request.prompt
    trusted = isinstance(prompt, TextPrompt) or prompt.template is None
    short = request.text_bytes <= LONG_PROMPT_BYTES and (
        isinstance(prompt, TextPrompt) or len(prompt.messages) <= MANY_MESSAGES
    )
    if trusted and short:
        return renderer.render(prompt)
    return await asyncio.get_running_loop().run_in_executor(threads, renderer.render, prompt)


class TokenTexts:
    """What single tokens look like, remembered, and the texts of answers; shared by all requests."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._texts: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = str(self._backend.decode([token_id], skip_special_tokens=False))
            self._texts[token_id] = text
        return text

    def answers(
        self, request: GenerationRequest, params: SamplingParams, token_ids: Sequence[int], count: int
    ) -> list[Detokenizer]:
        """What makes the texts of `count` answers to a request. token_ids: the prompt's."""
        prompt = request.prompt
        anew = isinstance(prompt, ChatPrompt) and not prompt.continue_final_message
        if request.constraint is not None:
            # It shows all that the grammar was told of, so also a space that it begins with.
            anew = False
        return [
            Detokenizer(
                self._backend,
                stop=params.stop,
                include_stop=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
                skip_special_tokens=params.skip_special_tokens,
                prime=token_ids[-PRIMING_TOKENS:],
                anew=anew,
                skipped=self._special if params.skip_special_tokens else frozenset(),
            )
            for _ in range(count)
        ]


def tokenized(
    rendered: RenderedPrompt,
    tokenizer: PreTrainedTokenizerFast,
    image_token_id: int | None,
    picture_tokens: Sequence[Sequence[int]],
) -> TokenizedPrompt:
    """rendered: with spans. picture_tokens: what stands for each picture instead of its one image token. CPU-bound."""
    token_ids, spans = rendered.token_ids, rendered.spans or [(0, 0)] * len(rendered.token_ids)
    if picture_tokens:
        placed: list[int] = []
        placed_spans: list[tuple[int, int]] = []
        waiting = iter(picture_tokens)
        for token_id, span in zip(token_ids, spans, strict=True):
            own = next(waiting) if token_id == image_token_id else (token_id,)
            placed += own
            placed_spans += [span] * len(own)
        token_ids, spans = placed, placed_spans
    pieces = list(tokenizer.convert_ids_to_tokens(token_ids))
    return TokenizedPrompt(rendered.text, token_ids, pieces, spans)


def detokenized(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> str:
    """CPU-bound. Raises InvalidRequest for an id that the tokenizer does not know."""
    size = len(tokenizer)
    if (bad := next((token for token in token_ids if not 0 <= token < size), None)) is not None:
        raise InvalidRequest(
            f"tokens holds an id that is not in the vocabulary of {size} tokens: {str(bad)[:40]}",
            param="tokens",
        )
    # A batch, because other threads run meanwhile.
    (text,) = tokenizer.backend_tokenizer.decode_batch([list(token_ids)], skip_special_tokens=False)
    return str(text)


def skipped_tokens(tokenizer: PreTrainedTokenizerFast) -> frozenset[str]:
    """What a text without special tokens is without."""
    return frozenset(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
