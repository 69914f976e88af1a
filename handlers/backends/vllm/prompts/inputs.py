"""A prompt and its images become vLLM's input: its own renderer places them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from handlers.backends.embeddings import EmbeddingsWanted
from handlers.backends.vllm.failures import refused
from handlers.backends.vllm.prompts.embeddings import embedding_data, misplaced
from handlers.backends.vllm.prompts.rendered import placeholders
from handlers.errors import ImageError, InvalidRequest, Unavailable
from handlers.request import EmbeddingsPart, ImagePart

if TYPE_CHECKING:
    from handlers.backends.vllm.compat import Vllm
    from handlers.request import MediaPart


class Inputs:
    """Makes the inputs of one backend, whichever engine serves it."""

    def __init__(self, vllm: Vllm) -> None:
        self._vllm = vllm
        self.embeddings: EmbeddingsWanted | None = None
        """What the model takes in place of images, once that is known."""

    async def placed(self, engine: Any, token_ids: Sequence[int], parts: Sequence[MediaPart] = ()) -> Any:
        """vLLM's input, its images placed; they are let go of here.

        token_ids: with what vLLM wants to see for each image (`places`).
        Raises ImageError, InvalidRequest, and Unavailable where the engine was lost meanwhile.
        """
        prompt: dict[str, Any] = {"prompt_token_ids": list(token_ids)}
        params = self._vllm.TokenizeParams(max_total_tokens=None, add_special_tokens=False)
        try:
            if parts:
                digests = [part.loaded.digest.hex() for part in parts if part.loaded is not None]
                assert len(digests) == len(parts), "loaded before the backend sees them"
                prompt["multi_modal_data"] = {"image": await self._data(parts)}
                prompt["multi_modal_uuids"] = {"image": digests}
            parsed = self._vllm.parse_model_prompt(engine.model_config, prompt)
            (ready,) = await engine.renderer.render_cmpl_async([parsed], params)
        except self._vllm.VLLMClientError as error:
            raise refused(error) from error
        except (AssertionError, ValueError, TypeError, RuntimeError) as error:
            if engine.errored:
                # The renderer has been shut down, which is not the fault of the request.
                raise Unavailable("the engine is being restarted; try again", retry_after=5) from error
            if not parts:
                raise refused(error) from error
            raise ImageError(0, "the model's processor cannot prepare these images") from error
        finally:
            for part in parts:
                part.release()
        places = len(placeholders(ready))
        if places != len(parts):
            raise InvalidRequest(
                f"the request has {len(parts)} images, but {places} of them have a place in its prompt"
            )
        if self.embeddings is not None and any(isinstance(part, EmbeddingsPart) for part in parts):
            wrong = misplaced(ready, self.embeddings.hidden_size)
            if wrong is not None:
                raise ImageError(0, wrong)
        return ready

    async def _data(self, parts: Sequence[MediaPart]) -> Any:
        embedded = [part for part in parts if isinstance(part, EmbeddingsPart)]
        if not embedded:
            return [part.loaded.image for part in parts if isinstance(part, ImagePart) and part.loaded]
        assert len(embedded) == len(parts), "a request holds images or embeddings"
        if self.embeddings is None:
            raise InvalidRequest(
                "image_embeds: this model's images cannot be sent as embeddings; send the images",
                param="image_embeds",
            )
        loaded = self.embeddings.checked(embedded)
        return await asyncio.to_thread(embedding_data, loaded, self.embeddings.dtype)
