"""`LLM`: a model in a script, with the methods and results of vLLM's and Aphrodite's class of that name."""

from __future__ import annotations

import logging
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from handlers.errors import InvalidRequest, ServingError
from handlers.offline.batch import Outcome
from handlers.offline.core import Core
from handlers.offline.multimodal import PromptImages, prompts_with_data
from handlers.offline.options import configure
from handlers.offline.outputs import RequestOutput, answered, failed
from handlers.offline.params import SamplingParams
from handlers.offline.prompts import (
    conversations_in,
    prompt_text,
    prompts_in,
    read_conversation,
    read_prompt,
)
from handlers.progress import shown_to_script
from handlers.prompts.tokenizer import load_tokenizer
from handlers.protocols.errors import client_error
from handlers.request import GenerationRequest, Prompt, TextPart, TextPrompt

logger = logging.getLogger(__name__)

Params = SamplingParams | Sequence[SamplingParams] | None
Reader = Callable[[Any], Prompt]


class LLM:
    """A loaded model. Close it, use it as a context manager, or just drop it: its processes end with it.

    Its methods block and may be called from any thread, also where an event loop runs (a notebook).
    """

    def __init__(self, model: str, **options: Any) -> None:
        """Load a model.

        Args:
            model: A directory, a hub id or an s3:// URL.
            **options: Those of serving.properties by their names, and the arguments of vLLM's constructor. Environment
                variables count as they do for a server.

        Raises:
            TypeError: An argument is unknown.
            ConfigurationError: A value is not allowed.
            ArtefactError: The model cannot be fetched.
            ServingError: The model cannot be loaded.
        """
        with shown_to_script():
            self._core = Core(configure(str(model), options))
        self._prompt_images = PromptImages(
            Path(self._core.directory),
            self._core.image_tokens,
            self._core.configuration.settings.image_feature_size,
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
        """Continue prompts in the model's own format; results in the order of the prompts.

        prompts: one or a list of: a text; `{"prompt": text, "multi_modal_data": {"image": image or images}}`;
        the same with `prompt_token_ids`; token ids. An image is a PIL image or an array of bytes, its embeddings, or
        one of the wrappers of vLLM's older pages, and comes where the prompt has a placeholder, or as many adjacent
        ones as it has tokens, or before the text of one that has none.
        sampling_params: for all, or one for each; None for the model's own defaults.
        use_tqdm: whether to show progress, or what to make the bar with.
        raise_on_error: True raises the first error; False puts each into the `error` of its result, where the
        answers are then empty; None, the default, raises for a prompt that was given alone, not in a list.

        prompt_token_ids, multi_modal_data, multi_modal_datas: of the prompts, as vLLM took them up to 0.5.
        lora_request, tokenization_kwargs, mm_processor_kwargs: None, which vLLM's users write out too.

        Raises ServingError (see raise_on_error), TypeError and ValueError for arguments that do not fit together.
        """
        _refuse(
            lora_request=lora_request,
            tokenization_kwargs=tokenization_kwargs,
            mm_processor_kwargs=mm_processor_kwargs,
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
        """Answer one conversation or a list of them; results in their order.

        messages: as OpenAI's chat completions take them; images as `{"type": "image_url", "image_url": {"url":
        ...}}` or `{"type": "image_pil", "image_pil": image}`. chat_template: a template's text, in place of the
        model's. The others as for `generate`.
        """
        _refuse(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        if chat_template_content_format not in (
            "auto",
            self._core.configuration.settings.chat_template_content_format,
        ):
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
        """What the model's generation_config.json recommends."""
        return SamplingParams(**self._core.backend.capabilities.default_sampling)  # type: ignore[arg-type]

    def get_tokenizer(self) -> Any:
        """The model's tokenizer, as transformers loads it."""
        return load_tokenizer(
            str(self._core.directory),
            trust_remote_code=self._core.configuration.settings.trust_remote_code,
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
        bar = use_tqdm if callable(use_tqdm) else tqdm
        shown = {
            "desc": "Processed prompts",
            "unit": "prompt",
            "dynamic_ncols": True,
            "disable": not use_tqdm,
        }
        with (
            bar(total=len(given), **shown) as progress,
            closing(self._core.outcomes(requests)) as outcomes,
        ):
            progress.update(len(given) - len(requests))
            began, tokens = time.monotonic(), 0
            for number, outcome in outcomes:
                place = places[number]
                results[place] = result = _result(requests[number], outcome, given[place], params[place])
                if result.error is not None and strict:
                    raise result.error
                tokens += sum(len(output.token_ids) for output in result.outputs)
                progress.set_postfix_str(
                    f"{tokens / max(1e-9, time.monotonic() - began):.0f} tokens/s", refresh=False
                )
                progress.update()
        whole = [result for result in results if result is not None]
        _report([result.error for result in whole if result.error is not None], len(whole))
        return whole


def _request(request_id: str, prompt: Prompt, params: SamplingParams, priority: int) -> GenerationRequest:
    """Raises InvalidRequest."""
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
    text = prompt_text(request.prompt, outcome.stats.prompt_text)
    return answered(
        request.request_id,
        text,
        outcome.stats,
        outcome.answers,
        logprobs=params.logprobs is not None,
        best=params.answers()[1],
    )


def _refuse(**given: object) -> None:
    """Raises TypeError for an argument of vLLM's that cannot be obeyed and asks for something."""
    for name, value in given.items():
        if value and not (isinstance(value, list) and not any(value)):
            raise TypeError(f"{name} is not supported: leave it out")


def _count(params: SamplingParams) -> int:
    """Of empty answers where there are none, whatever `n` has been set to."""
    try:
        return params.answers()[1] or params.answers()[0]
    except InvalidRequest:
        return 1


def _one_each(name: str, given: Any, count: int, kind: type) -> list[Any]:
    """The same for each, or the list of them."""
    if isinstance(given, kind):
        return [given] * count
    several = list(given)
    if len(several) != count or not all(isinstance(one, kind) for one in several):
        raise ValueError(
            f"{name}: give one {kind.__name__}, or a list of {count}, as many as there are prompts"
        )
    return several


def _shown(item: Any) -> str | None:
    text = item.get("prompt") if isinstance(item, Mapping) else item
    return text if isinstance(text, str) else None


def _report(errors: Sequence[ServingError], count: int) -> None:
    if errors:
        logger.warning(
            "%d of %d prompts failed, see `error` of their results; the first: %s",
            len(errors),
            count,
            errors[0],
        )
