"""Small requests of our own: whether an engine answers, whether it accepts embeddings, and what has to be compiled."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from handlers.backends.vllm.compat import replica_count
from handlers.backends.vllm.outputs import failed
from handlers.backends.vllm.prompts import embeddings_wanted, place_images, smallest_embeddings
from handlers.errors import InvalidConfiguration, InvalidRequest, ServingError

if TYPE_CHECKING:
    from handlers.backends.embeddings import EmbeddingsWanted
    from handlers.backends.vllm.compat import Vllm
    from handlers.backends.vllm.prompts import VllmPrompts

logger = logging.getLogger(__name__)


class Probes:
    """Sends requests of our own to an engine."""

    def __init__(self, vllm: Vllm, numbers: Iterator[int]) -> None:
        """numbers: make the ids of all requests to an engine unique."""
        self._vllm = vllm
        self._numbers = numbers

    async def ask(self, engine: Any, replica: int) -> None:
        """Have one replica generate a token."""
        await self._generate(engine, replica, _tokens(1), max_tokens=1)

    async def warm(self, engine: Any, replica: int) -> None:
        """Have one replica compile what the first requests would otherwise wait for.

        The first request with log probabilities waits seconds for a compiler, and again for several rows, as with a
        prompt of three tokens. Features that the options forbid are skipped.
        """
        count = min(1, engine.model_config.max_logprobs % 2**31)  # -1: no limit
        fields: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "logprobs": count}
        if not engine.vllm_config.cache_config.kv_sharing_fast_prefill:
            fields["prompt_logprobs"] = count
        try:
            await self._generate(engine, replica, _tokens(3), max_tokens=2, **fields)
        except Exception as error:
            known = failed(self._vllm, error, accepted=engine.errored)
            if not isinstance(known, InvalidRequest):
                raise
            logger.warning("first requests may wait for a compiler: %s", known.message)
            await self.ask(engine, replica)

    async def embeddings(self, engine: Any, prompts: VllmPrompts) -> EmbeddingsWanted | None:
        """Return the embeddings that the model accepts; None if it accepts none.

        Raises InvalidConfiguration if the engine fails on them.
        """
        wanted, token = embeddings_wanted(engine), prompts.renderer.image_token_id
        if wanted is None or token is None:
            return None
        parts = [smallest_embeddings(wanted)]
        try:
            prompt = await place_images(
                self._vllm, engine, prompts.with_placeholders([token], parts), parts, wanted
            )
            await self._generate(engine, 0, prompt, max_tokens=1)
        except ServingError as error:
            logger.warning("embeddings of images are refused: %s", error.message)
            return None
        except Exception as error:
            raise InvalidConfiguration(
                "option.enable_mm_embeds: the engine fails on embeddings of this model's images; leave it out"
            ) from error
        return wanted

    async def _generate(self, engine: Any, replica: int, prompt: Any, **params: Any) -> None:
        fields = {"temperature": 0.0, "detokenize": False, **params}
        if engine.model_config.return_sampling_mask:
            # Requests must sample then, and from a bounded number of tokens.
            fields |= {"temperature": 1.0, "top_k": 1}
        outputs = engine.generate(
            prompt,
            self._vllm.SamplingParams(**fields),
            f"probe-{next(self._numbers)}",
            data_parallel_rank=replica if replica_count(engine) > 1 else None,
        )
        async for _ in outputs:
            pass


def _tokens(count: int) -> dict[str, Any]:
    """Return a prompt as vLLM's renderer makes it: any tokens will do."""
    return {"type": "token", "prompt_token_ids": [0] * count}
