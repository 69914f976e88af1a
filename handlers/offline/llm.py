"""`LLM`: a model in a script, with the methods and results of the class of that name in vLLM and Aphrodite."""

from __future__ import annotations

import logging
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from handlers.errors import InvalidRequest, ServingError
from handlers.offline.batch import Outcome
from handlers.offline.core import Core
from handlers.offline.images import PromptImages
from handlers.offline.options import configure
from handlers.offline.outputs import RequestOutput, answered, failed
from handlers.offline.params import SamplingParams
from handlers.offline.prompts import conversations_in, prompts_in, prompts_with_data, read_conversation, read_prompt
from handlers.progress import shown_to_script
from handlers.prompts.tokenizer import load_tokenizer
from handlers.protocols.errors import client_error
from handlers.request import GenerationRequest, Prompt, TextPart, TextPrompt

logger = logging.getLogger(__name__)

Params = SamplingParams | Sequence[SamplingParams] | None
Reader = Callable[[Any], Prompt]


class LLM:
    """A loaded model. Its processes end when it is closed, left as a context manager, or no longer referenced.

    Its methods block. They may be called from any thread, even from one with a running event loop (a notebook).
    """

    def __init__(self, model: str, **options: Any) -> None:
        """Load a model.

        Args:
            model: A directory, a hub id or an s3:// URL.
            **options: Options by their names in serving.properties, and the arguments of vLLM's constructor.
                Environment variables have the same effect as for a server.

        Raises:
            TypeError: An argument is unknown.
            ConfigurationError: A value is not allowed.
            ArtefactError: The model cannot be fetched.
            ServingError: The model cannot be loaded.
        """
        with shown_to_script():
            self._core = Core(configure(str(model), options))
        self._prompt_images = PromptImages(
            self._core.directory, self._core.image_tokens, self._core.configuration.settings.image_feature_size
        )
        self._end = weakref.finalize(self, self._core.close)

    def generate(
        self,
        prompts: Any = None,
        sampling_params: Params = None,
        *,
        prompt_token_ids: Sequence[Any] | None = None,
        multi_modal_data: Any = None,
        multi_modal_datas: Any = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: None = None,
        mm_processor_kwargs: None = None,
        raise_on_error: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts in the model's own format. Results are in the order of the prompts.

        Args:
            prompts: One prompt or a list. A prompt is a text; token ids; or a dict such as `{"prompt": text,
                "multi_modal_data": {"image": image or images}}`, with `prompt_token_ids` instead of `prompt` if it is
                tokenised. An image is a PIL image, an array of bytes, embeddings, or a wrapper of vLLM's older pages.
                It takes the place of a placeholder, or of as many adjacent ones as it has tokens; without
                placeholders, images come before the text.
            sampling_params: For all prompts, or one for each; None for the model's defaults.
            prompt_token_ids: Of the prompts, as in vLLM up to 0.5.
            multi_modal_data: The same.
            multi_modal_datas: The same.
            use_tqdm: Whether to show progress, or a function that makes the progress bar.
            lora_request: Only None, as for tokenization_kwargs and mm_processor_kwargs.
            priority: For all prompts, or one for each.
            tokenization_kwargs: Only None.
            mm_processor_kwargs: Only None.
            raise_on_error: True raises the first error. False puts each error into its result, whose answers are then
                empty. None raises if a single prompt was given, not in a list.

        Raises:
            ServingError: See raise_on_error.
            TypeError: An argument is not supported.
            ValueError: Arguments do not fit together.
        """
        _refuse(
            lora_request=lora_request, tokenization_kwargs=tokenization_kwargs, mm_processor_kwargs=mm_processor_kwargs
        )
        data = multi_modal_datas if multi_modal_data is None else multi_modal_data
        given, alone = prompts_in(prompts_with_data(prompts, prompt_token_ids, data))
        placeholder = self._core.backend.capabilities.image_placeholder

        def read(prompt: Any) -> Prompt:
            return read_prompt(prompt, placeholder, self._prompt_images)

        strict = alone if raise_on_error is None else raise_on_error
        return self._answers(given, read, sampling_params, use_tqdm, priority, strict)

    def chat(
        self,
        messages: Any,
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        *,
        priority: int | Sequence[int] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
        raise_on_error: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them. Results are in their order. See also `generate`.

        messages: as in OpenAI's chat completions; images as `{"type": "image_url", "image_url": {"url": ...}}` or
        `{"type": "image_pil", "image_pil": image}`. chat_template: text of a template to use instead of the model's.
        """
        _refuse(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        if chat_template_content_format not in ("auto", self._core.configuration.settings.chat_template_content_format):
            raise ValueError(
                f"chat_template_content_format {chat_template_content_format!r} is not this LLM's: "
                "give it to LLM() instead"
            )
        given, alone = conversations_in(messages)

        def read(conversation: Any) -> Prompt:
            return read_conversation(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
            )

        strict = alone if raise_on_error is None else raise_on_error
        return self._answers(given, read, sampling_params, use_tqdm, priority, strict)

    def get_default_sampling_params(self) -> SamplingParams:
        """Return what the model's generation_config.json recommends."""
        return SamplingParams(**self._core.backend.capabilities.default_sampling)  # type: ignore[arg-type]

    def get_tokenizer(self) -> Any:
        """Return the model's tokenizer, as transformers loads it."""
        return load_tokenizer(
            str(self._core.directory), trust_remote_code=self._core.configuration.settings.trust_remote_code
        )

    def close(self) -> None:
        """End the engine's processes. Safe to call twice."""
        self._end()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answers(
        self,
        given: Sequence[Any],
        read: Reader,
        sampling_params: Params,
        use_tqdm: bool | Callable[..., Any],
        priority: int | Sequence[int] | None,
        strict: bool,
    ) -> list[RequestOutput]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = _one_each("sampling_params", sampling_params, len(given), SamplingParams)
        priorities = _one_each("priority", priority or 0, len(given), int)
        results: list[RequestOutput | None] = [None] * len(given)
        requests: list[GenerationRequest] = []
        places: list[int] = []
        for place, item in enumerate(given):
            request_id = uuid.uuid4().hex
            try:
                request = _request(request_id, read(item), params[place], priorities[place])
                self._core.check(request)
            except Exception as error:
                if strict:
                    raise
                known = client_error(error, request_id)
                results[place] = failed(request_id, _shown(item), _count(params[place]), known)
            else:
                requests.append(request)
                places.append(place)
        make_bar = use_tqdm if callable(use_tqdm) else tqdm
        bar = make_bar(
            total=len(given), desc="Processed prompts", unit="prompt", dynamic_ncols=True, disable=not use_tqdm
        )
        with bar as progress, closing(self._core.outcomes(requests)) as outcomes:
            progress.update(len(given) - len(requests))
            began, tokens = time.monotonic(), 0
            for number, outcome in outcomes:
                place = places[number]
                results[place] = result = _result(requests[number], outcome, given[place], params[place])
                if result.error is not None and strict:
                    raise result.error
                tokens += sum(len(output.token_ids) for output in result.outputs)
                progress.set_postfix_str(f"{tokens / max(1e-9, time.monotonic() - began):.0f} tokens/s", refresh=False)
                progress.update()
        complete = [result for result in results if result is not None]
        errors = [result.error for result in complete if result.error is not None]
        if errors:
            logger.warning(
                "%d of %d prompts failed, see `error` of their results; the first: %s",
                len(errors),
                len(complete),
                errors[0],
            )
        return complete


def _request(request_id: str, prompt: Prompt, params: SamplingParams, priority: int) -> GenerationRequest:
    count, _ = params.answers()
    parts = prompt.parts if isinstance(prompt, TextPrompt) else [p for m in prompt.messages for p in m.parts]
    return GenerationRequest(
        request_id=request_id,
        prompt=prompt,
        sampling=params.engine_params(),
        n=count,
        priority=priority,
        truncate_prompt_tokens=params.truncation(),
        text_bytes=sum(len(part.text) for part in parts if isinstance(part, TextPart)),
        constraint=params.constraint(),
    )


def _result(request: GenerationRequest, outcome: Outcome, item: Any, params: SamplingParams) -> RequestOutput:
    if isinstance(outcome, ServingError):
        return failed(request.request_id, _shown(item), _count(params), outcome)
    as_ids = isinstance(request.prompt, TextPrompt) and request.prompt.token_ids is not None
    return answered(
        request.request_id,
        None if as_ids else outcome.stats.prompt_text,
        outcome.stats,
        outcome.answers,
        logprobs=params.logprobs is not None,
        best=params.answers()[1],
    )


def _refuse(**given: object) -> None:
    """Raises TypeError for an argument of vLLM's that is not supported and has a value."""
    for name, value in given.items():
        if value and not (isinstance(value, list) and not any(value)):
            raise TypeError(f"{name} is not supported: leave it out")


def _count(params: SamplingParams) -> int:
    """Return how many empty answers to show after an error; 1 if `n` is not a number of answers."""
    try:
        return params.answers()[1] or params.answers()[0]
    except InvalidRequest:
        return 1


def _one_each(name: str, given: Any, count: int, kind: type) -> list[Any]:
    """Return one value for each: the given one repeated, or the given list."""
    if isinstance(given, kind):
        return [given] * count
    several = list(given)
    if len(several) != count or not all(isinstance(one, kind) for one in several):
        raise ValueError(f"{name}: give one {kind.__name__}, or a list of {count}, as many as there are prompts")
    return several


def _shown(item: Any) -> str | None:
    text = item.get("prompt") if isinstance(item, Mapping) else item
    return text if isinstance(text, str) else None
