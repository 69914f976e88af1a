"""`LLM`: a model in a script, with the methods and results of vLLM's and Aphrodite's class of that name."""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from handlers.artefacts.fetch import fetch
from handlers.build import build_backend, build_images, choose_backend
from handlers.errors import InvalidRequest, ServingError
from handlers.images.loader import ImageLoader
from handlers.offline.background import LoopThread, script_not_run_again
from handlers.offline.batch import Batch, Outcome
from handlers.offline.options import check_names, configure, warn_of_names
from handlers.offline.outputs import RequestOutput, answered, failed
from handlers.offline.params import SamplingParams
from handlers.offline.prompts import (
    conversations_in,
    prompt_text,
    prompts_in,
    read_conversation,
    read_prompt,
)
from handlers.request import GenerationRequest, Prompt, TextPart, TextPrompt
from properties.configuration import Configuration

logger = logging.getLogger(__name__)

_AHEAD = 64
"""Requests that are fetched, prepared and queued beyond those that generate."""

_CLOSE_SECONDS = 10.0

Params = SamplingParams | Sequence[SamplingParams] | None
Reader = Callable[[Any], Prompt]


class LLM:
    """A loaded model. Close it, use it as a context manager, or just drop it: its processes end with it.

    Its methods block and may be called from any thread, also where an event loop runs (a notebook).
    """

    def __init__(self, model: str, **options: Any) -> None:
        """model: a directory, a hub id or an s3:// URL. options: those of serving.properties by their names, and
        the arguments of vLLM's constructor; the environment counts as it does for a server.

        Raises TypeError for an unknown argument, ConfigurationError for a bad value, ArtefactError when the model
        cannot be fetched and ServingError when it cannot be loaded.
        """
        self._core = _Core(configure(str(model), options))
        self._end = weakref.finalize(self, self._core.close)

    def generate(
        self,
        prompts: Any,
        sampling_params: Params = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: int | Sequence[int] | None = None,
        raise_on_error: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts in the model's own format; results in the order of the prompts.

        prompts: one or a list of: a text; `{"prompt": text, "multi_modal_data": {"image": picture or pictures}}`;
        the same with `prompt_token_ids`; token ids. A picture is a PIL image or an array of bytes, and comes where
        the prompt has a placeholder, or before the text of one that has none.
        sampling_params: for all, or one for each; None for the model's own defaults.
        use_tqdm: whether to show progress, or what to make the bar with.
        raise_on_error: True raises the first error; False puts each into the `error` of its result, where the
        answers are then empty; None, the default, raises for a prompt that was given alone, not in a list.

        Raises ServingError (see raise_on_error), TypeError and ValueError for arguments that do not fit together.
        """
        given, alone = prompts_in(prompts)
        placeholder = self._core.backend.capabilities.image_placeholder

        def read(prompt: Any) -> Prompt:
            return read_prompt(prompt, placeholder)

        strict = alone if raise_on_error is None else raise_on_error
        return self._answers(given, read, sampling_params, use_tqdm, priority, strict)

    def chat(
        self,
        messages: Any,
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        raise_on_error: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them; results in their order.

        messages: as OpenAI's chat completions take them; pictures as `{"type": "image_url", "image_url": {"url":
        ...}}` or `{"type": "image_pil", "image_pil": picture}`. chat_template: a template's text, in place of the
        model's. The others as for `generate`.
        """
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
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            self._core.directory, trust_remote_code=self._core.configuration.settings.trust_remote_code
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
            except ServingError as error:
                if strict:
                    raise
                results[place] = failed(request_id, _shown(item), params[place].n, error)
            else:
                requests.append(request)
                places.append(place)
        bar = use_tqdm if callable(use_tqdm) else tqdm
        with bar(
            total=len(given),
            desc="Processed prompts",
            dynamic_ncols=True,
            disable=not use_tqdm,
            unit="prompt",
        ) as progress:
            progress.update(len(given) - len(requests))
            began, tokens = time.monotonic(), 0
            for number, outcome in self._core.outcomes(requests):
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


class _Core:
    """What an `LLM` holds and what must outlive it until it is closed: never refers to the `LLM` itself."""

    def __init__(self, configuration: Configuration) -> None:
        cancelled = threading.Event()
        try:
            self.directory = fetch(configuration.model_location, configuration.settings, cancelled)
        finally:
            cancelled.set()
        known = {problem.message for problem in configuration.warnings}
        self.configuration = configuration = configuration.with_model_directory(Path(self.directory))
        for problem in configuration.warnings:
            if problem.message not in known:
                logger.warning("%s", problem)
        settings = configuration.settings
        choice = choose_backend(configuration, self.directory)
        check_names(configuration, choice.backend)
        warn_of_names(configuration, choice.backend)
        self.backend = build_backend(configuration, self.directory)
        self._images: ImageLoader | None = None
        self._loop = LoopThread()
        try:
            with script_not_run_again():
                self._loop.run(self.backend.load())
            self._images = build_images(settings)
        except BaseException:
            self.close()
            raise
        self._most = settings.limit_mm_per_prompt.get("image", 1)
        window = settings.max_rolling_batch_size + min(_AHEAD, settings.max_rolling_batch_size)
        self._batch = Batch(self.backend, self._images, window, settings.model_loading_timeout)

    def check(self, request: GenerationRequest) -> None:
        """Raises InvalidRequest for what no backend is asked."""
        if request.constraint is not None and not self.backend.capabilities.structured_outputs:
            raise InvalidRequest("answers cannot be constrained here: leave structured_outputs out")
        count = sum(1 for _ in request.images())
        if count and not self.backend.capabilities.images:
            raise InvalidRequest("this model does not take pictures")
        if count > self._most:
            raise InvalidRequest(
                f"the prompt holds {count} pictures; limit_mm_per_prompt allows {self._most}"
            )

    def outcomes(self, requests: Sequence[GenerationRequest]) -> Any:
        """(number, outcome) of each request as it is done. Closed early, it aborts the others."""
        if not self._loop.usable:
            raise RuntimeError("this LLM is closed, or belongs to the process that was forked")
        ready: queue.SimpleQueue[tuple[int, Outcome] | Future[None]] = queue.SimpleQueue()
        work = self._loop.start(
            self._batch.run(requests, lambda number, outcome: ready.put((number, outcome)))
        )
        work.add_done_callback(ready.put)
        try:
            while not isinstance(item := ready.get(), Future):
                yield item
            item.result()
        finally:
            work.cancel()

    def close(self) -> None:
        """End the backend and the thread. Called by the garbage collector too, in whatever thread."""
        if not self._loop.usable:
            return
        if self._loop.inside:
            threading.Thread(target=self.close, name="offline-close").start()
            return
        closing = self._loop.start(self._closed())
        try:
            closing.result(_CLOSE_SECONDS)
        except TimeoutError:
            logger.warning("the engine did not end within %.0f s", _CLOSE_SECONDS)
        self._loop.stop()

    async def _closed(self) -> None:
        if self._images is not None:
            await self._images.aclose()
        await self.backend.close()


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
        truncate_prompt_tokens=params.truncate_prompt_tokens,
        text_bytes=sum(len(part.text) for part in parts if isinstance(part, TextPart)),
        constraint=params.constraint(),
    )


def _result(request: GenerationRequest, outcome: Outcome, item: Any, params: SamplingParams) -> RequestOutput:
    if isinstance(outcome, ServingError):
        return failed(request.request_id, _shown(item), params.n, outcome)
    text = prompt_text(request.prompt, outcome.stats.prompt_text)
    return answered(
        request.request_id,
        text,
        outcome.stats,
        outcome.answers,
        logprobs=params.logprobs is not None,
        best=params.answers()[1],
    )


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
