"""A prompt and its pictures become vLLM's input: its own renderer places them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from handlers.backends.vllm.failures import refused
from handlers.backends.vllm.turns import PictureTurns
from handlers.errors import ImageError, InvalidRequest

if TYPE_CHECKING:
    from handlers.backends.vllm.compat import Vllm
    from handlers.request import ImagePart


class Inputs:
    """Makes the inputs of one backend, whichever engine serves it."""

    def __init__(self, vllm: Vllm) -> None:
        self._vllm = vllm
        self._turns = PictureTurns()

    async def placed(self, engine: Any, token_ids: Sequence[int], parts: Sequence[ImagePart] = ()) -> Any:
        """vLLM's input, its pictures placed; they are let go of here.

        token_ids: with what vLLM wants to see for each picture (`places`).
        Raises ImageError and InvalidRequest.
        """
        prompt: dict[str, Any] = {"prompt_token_ids": list(token_ids)}
        digests: list[str] = []
        if parts:
            loaded = [part.loaded for part in parts]
            assert all(picture is not None for picture in loaded), "loaded before the backend sees them"
            prompt["multi_modal_data"] = {"image": [picture.image for picture in loaded if picture]}
            digests = [picture.digest.hex() for picture in loaded if picture]
            prompt["multi_modal_uuids"] = {"image": digests}
        parsed = self._vllm.parse_model_prompt(engine.model_config, prompt)
        params = self._vllm.TokenizeParams(max_total_tokens=None, add_special_tokens=False)
        try:
            async with self._turns.of(digests):
                ready = await _rendered(engine, parsed, params)
        except self._vllm.client_errors as error:
            raise refused(error) from error
        except (AssertionError, ValueError, TypeError, RuntimeError) as error:
            if not parts:
                raise refused(error) from error
            raise ImageError(0, "the model's processor cannot prepare these pictures") from error
        finally:
            for part in parts:
                part.release()
        places = len(picture_places(ready))
        if places != len(parts):
            take_back(engine, ready)
            raise InvalidRequest(
                f"the request has {len(parts)} pictures, but {places} of them have a place in its prompt"
            )
        return ready


def picture_places(prompt: Any) -> list[Any]:
    """Where an input's pictures stand, in no order: each has an `offset` and a `length` in tokens."""
    return list((prompt.get("mm_placeholders") or {}).get("image", ()))


def take_back(engine: Any, prompt: Any) -> None:
    """Say that rendered pictures were not sent after all.

    vLLM's front notes when it renders a picture that the engine has it from now on: the next request with the same
    picture would come without it, and fail.
    """
    forget = getattr(getattr(engine.renderer, "mm_processor_cache", None), "invalidate", None)
    if forget is not None:
        for digest in (prompt.get("mm_hashes") or {}).get("image", ()):
            forget(digest)


async def _rendered(engine: Any, parsed: Any, params: Any) -> Any:
    """The thread that renders goes on when its request is cancelled: its result is waited for, and taken back."""
    rendering = asyncio.ensure_future(engine.renderer.render_cmpl_async([parsed], params))
    try:
        (ready,) = await asyncio.shield(rendering)
        return ready
    except asyncio.CancelledError:
        while not rendering.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([rendering])
        if not rendering.cancelled() and rendering.exception() is None:
            take_back(engine, rendering.result()[0])
        raise
