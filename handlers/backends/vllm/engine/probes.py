"""Requests of our own to vLLM's engine: does it answer, is it warm, does it bear embeddings of images?"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from handlers.backends.vllm.engine.watch import count_replicas
from handlers.backends.vllm.failures import failed
from handlers.backends.vllm.prompts.embeddings import embeddings_wanted, smallest
from handlers.errors import InvalidConfiguration, InvalidRequest, ServingError

if TYPE_CHECKING:
    from handlers.backends.vllm.compat import Vllm
    from handlers.backends.vllm.prompts.front import VllmFront
    from handlers.backends.vllm.prompts.inputs import Inputs
    from handlers.request import MediaPart

logger = logging.getLogger(__name__)


class Probes:
    """Small requests of our own, which find out whether an engine works and prepare it for clients."""

    def __init__(self, vllm: Vllm, inputs: Inputs, numbers: Iterator[int]) -> None:
        """numbers: no two requests of an engine have the same."""
        self._vllm = vllm
        self._inputs = inputs
        self._numbers = numbers

    async def ask(self, engine: Any, replica: int) -> None:
        """For one token of one replica."""
        await self._generate(engine, replica, [0], max_tokens=1, **_likeliest(engine))

    async def warm(self, engine: Any, replica: int) -> None:
        """Have one replica compile what the first requests would otherwise wait for.

        The first request with log probabilities waits seconds for a compiler, and again for several rows, as with a
        prompt of three tokens. Features that this engine rejects are skipped, since no client can use them.
        """
        try:
            await self._generate(engine, replica, [0] * 3, max_tokens=2, **_warming(engine))
        except Exception as error:
            known = failed(self._vllm, error, accepted=engine.errored)
            if not isinstance(known, InvalidRequest):
                raise
            logger.warning("first requests may wait for a compiler: %s", known.message)
            await self.ask(engine, replica)

    async def try_embeddings(self, engine: Any, front: VllmFront) -> None:
        """Take them from clients if the model does. Raises InvalidConfiguration where the engine fails on them."""
        wanted = self._inputs.embeddings = embeddings_wanted(engine)
        token = front.renderer.image_token_id
        if wanted is None or token is None:
            return
        parts = [smallest(wanted)]
        try:
            prompt = front.exchanged([token], parts)
            await self._generate(engine, 0, prompt, parts, max_tokens=1, **_likeliest(engine))
        except ServingError as error:
            logger.warning("embeddings of images are refused: %s", error.message)
            self._inputs.embeddings = None
        except Exception as error:
            raise InvalidConfiguration(
                "option.enable_mm_embeds: the engine fails on embeddings of this model's images; leave it out"
            ) from error

    async def _generate(
        self, engine: Any, replica: int, prompt: list[int], parts: Sequence[MediaPart] = (), **params: Any
    ) -> None:
        """Have a replica generate: the first token of the vocabulary is as good a prompt as any."""
        outputs = engine.generate(
            await self._inputs.placed(engine, prompt, parts),
            self._vllm.SamplingParams(detokenize=False, **params),
            f"probe-{next(self._numbers)}",
            data_parallel_rank=replica if count_replicas(engine) > 1 else None,
        )
        async for _ in outputs:
            pass


def _likeliest(engine: Any) -> dict[str, Any]:
    """The likeliest token, as this engine's options let it be asked for."""
    if getattr(engine.model_config, "return_sampling_mask", False):
        # The candidates are limited, too: the token has to be sampled, and from a bounded number.
        return {"temperature": 1.0, "top_k": 1}
    return {"temperature": 0.0}


def _warming(engine: Any) -> dict[str, Any]:
    """Of what the first requests may ask for, all that this engine's options allow."""
    config = engine.model_config
    count = 0 if config.max_logprobs == 0 else 1
    fields: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "logprobs": count}
    if not engine.vllm_config.cache_config.kv_sharing_fast_prefill:
        fields["prompt_logprobs"] = count
    if getattr(config, "return_sampling_mask", False):
        fields["top_k"] = 1
    return fields
