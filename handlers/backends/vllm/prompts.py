"""Prompts for vLLM: rendered and tokenised here; vLLM's own renderer places the images.

So text from a client is never read as a special token, and a request is the same prompt with every backend. A prompt
is rendered with one token for each image. If the model's processor wants several tokens there, or none, that token is a
stand-in, which is replaced before vLLM places the images.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engine.errors import ModelLoadError
from engine.families.preprocessor import GRID, PlaceholderText
from engine.messages import EMBEDDINGS
from handlers.backends.base import no_engine
from handlers.backends.embeddings import EmbeddingsWanted
from handlers.backends.mistral_format import mistral_weights_alone
from handlers.backends.model_text import ModelText
from handlers.backends.vllm.compat import accepts_images, embedding_fields, image_placeholder, mistral_tokens, most_rows
from handlers.backends.vllm.outputs import refused
from handlers.errors import ImageError, InvalidRequest
from handlers.prompts.chat_templates import read_chat_templates
from handlers.prompts.generation_config import read_generation_config
from handlers.request import EmbeddingsPart, ImagePart, LoadedEmbeddings

if TYPE_CHECKING:
    from handlers.backends.vllm.compat import Vllm
    from handlers.request import MediaPart
    from properties.settings import Settings

logger = logging.getLogger(__name__)


class VllmPrompts:
    """What prompts of one model need.

    Attributes:
        text: What its files say.
        images: Whether the model accepts images.
        embeddings: What it accepts in place of images; None if nothing.
    """

    embeddings: EmbeddingsWanted | None = None

    def __init__(self, settings: Settings, path: Path, tokenizer: Any, vllm: Vllm, engine: Any) -> None:
        """Read the model's files. Blocks. Raises ModelLoadError."""
        config = engine.model_config
        templates = read_chat_templates(settings.chat_template, path, tokenizer.chat_template)
        self.images = accepts_images(engine)
        token = text = self._written = None
        if self.images:
            placeholder, inserts = image_placeholder(vllm, config)
            token, text, self._written = image_placeholders(
                tokenizer,
                placeholder,
                _image_token_id(config.hf_config),
                settings.image_placeholder_token,
                inserts=inserts,
                printed="\x00".join(templates.all),
            )
            if mistral_weights_alone(path):
                self._written = mistral_tokens(engine) or self._written
        self.text = ModelText(
            settings,
            path,
            tokenizer,
            templates,
            config.hf_text_config,
            int(config.get_vocab_size()),
            defaults=generation_defaults(config, str(path)),
            image_token=token,
            written=None if text is None else PlaceholderText(text),
        )

    def with_placeholders(self, token_ids: list[int], parts: Sequence[MediaPart]) -> list[int]:
        """Return a rendered prompt with the tokens that vLLM wants for these images."""
        if self._written is None or not parts:
            return token_ids
        images = [part.loaded.image for part in parts if isinstance(part, ImagePart) and part.loaded]
        sizes = [(image.width, image.height) for image in images]
        return replaced(token_ids, self.text.renderer.image_token_id, self._written, sizes)


def generation_defaults(config: Any, path: str) -> dict[str, Any]:
    """Return the generation_config.json that vLLM's options choose. config: vLLM's ModelConfig."""
    source = config.generation_config
    own = {} if source == "vllm" else read_generation_config(path if source == "auto" else source)
    return {**own, **config.override_generation_config}


def _image_token_id(config: Any) -> int | None:
    for place in (config, getattr(config, "vision_config", None)):  # the latter in Mistral's own format
        for name in ("image_token_id", "image_token_index"):
            value = getattr(place, name, None)
            if isinstance(value, int):
                return value
    return None


class ImagePlaceholders(NamedTuple):
    """What stands for an image.

    Attributes:
        token: The token of a rendered prompt.
        placeholder: The text around it.
        written: The tokens that vLLM wants instead for image number `i` (from 0) of a (width, height); None if it wants
            the token itself.
    """

    token: str
    placeholder: str
    written: Callable[[int, tuple[int, int]], list[int]] | None = None


def replaced(
    token_ids: Sequence[int],
    token_id: int | None,
    written: Callable[[int, tuple[int, int]], list[int]],
    sizes: Sequence[tuple[int, int]] = (),
) -> list[int]:
    """Return a prompt with each `token_id` replaced. sizes: of its images; unknown for embeddings."""
    images = map(written, itertools.count(), itertools.chain(sizes, itertools.repeat((0, 0))))
    return [each for token in token_ids for each in (next(images) if token == token_id else [token])]


def image_placeholders(
    tokenizer: Any,
    placeholder: Callable[[int], str | None],
    image_token_id: int | None,
    wanted: str | None = None,
    *,
    inserts: bool = False,
    printed: str = "",
) -> ImagePlaceholders:
    """Return what stands for an image.

    Args:
        tokenizer: The model's.
        placeholder: What vLLM writes for image number `i` (from 1), if it says.
        image_token_id: From the model's config.
        wanted: The token that the operator has set.
        inserts: Whether the model's processor inserts the images itself.
        printed: The chat template's source, which must not print a stand-in.

    Raises:
        ModelLoadError: Nothing can stand for an image.
    """

    def encoded(text: str) -> list[int]:
        ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    own = None if image_token_id is None else tokenizer.convert_ids_to_tokens(image_token_id)
    if own is not None and encoded(own) != [image_token_id]:
        own = None
    if inserts:
        token = wanted or own or _stand_in(tokenizer, printed)
        return ImagePlaceholders(token, token, lambda number, size: [])
    if wanted is not None:
        return ImagePlaceholders(wanted, wanted)
    first = placeholder(1)
    if first is not None:
        ids = encoded(first)
        if len(ids) == 1 and first == placeholder(2):
            return ImagePlaceholders(first, first)
        if own is not None and image_token_id in ids:
            return ImagePlaceholders(own, first)
    if own is not None:
        return ImagePlaceholders(own, own)
    if first is None:
        raise ModelLoadError(
            "it is not known which token stands for an image in this model's prompts: "
            "set option.image_placeholder_token"
        )
    token = _stand_in(tokenizer, printed)
    logger.info("images are written as %r in this model's prompts", first)
    return ImagePlaceholders(token, token, lambda number, size: encoded(placeholder(number + 1) or ""))


def _stand_in(tokenizer: Any, printed: str) -> str:
    """Return a special token that nothing else prints."""
    ends = (tokenizer.bos_token, tokenizer.eos_token)
    for token in tokenizer.added_tokens_decoder.values():
        text = str(token.content)
        if token.special and text not in ends and text not in printed:
            return text
    raise ModelLoadError("no token can stand for an image in this model's prompts: set option.image_placeholder_token")


async def place_images(
    vllm: Vllm,
    engine: Any,
    token_ids: Sequence[int],
    parts: Sequence[MediaPart],
    embeddings: EmbeddingsWanted | None = None,
) -> Any:
    """Return vLLM's input with its images placed; the loaded images are released.

    Args:
        vllm: The imported names.
        engine: The one that gets the input.
        token_ids: With what vLLM wants to see for each image.
        parts: The images, loaded.
        embeddings: What the model accepts in place of images.

    Raises:
        ImageError: The model's processor cannot prepare the images.
        InvalidRequest: vLLM refuses the prompt.
        Unavailable: The engine was lost meanwhile.
    """
    prompt: dict[str, Any] = {"prompt_token_ids": list(token_ids)}
    params = vllm.TokenizeParams(max_total_tokens=None, add_special_tokens=False)
    try:
        if parts:
            prompt["multi_modal_data"] = {"image": await _image_data(parts, embeddings)}
            digests = [part.loaded.digest.hex() for part in parts if part.loaded is not None]
            prompt["multi_modal_uuids"] = {"image": digests}
        parsed = vllm.parse_model_prompt(engine.model_config, prompt)
        (ready,) = await engine.renderer.render_cmpl_async([parsed], params)
    except vllm.VLLMClientError as error:
        raise refused(error) from error
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        if engine.errored:
            # The renderer has been shut down, which is not the fault of the request.
            raise no_engine() from error
        if not parts:
            raise refused(error) from error
        raise ImageError(0, "the model's processor cannot prepare these images") from error
    finally:
        for part in parts:
            part.release()
    placed = placeholders(ready)
    if len(placed) != len(parts):
        raise InvalidRequest(
            f"the request has {len(parts)} images, but {len(placed)} of them have a place in its prompt"
        )
    if embeddings is not None and any(isinstance(part, EmbeddingsPart) for part in parts):
        _check_rows(ready, embeddings.hidden_size)
    return ready


def placeholders(prompt: Any) -> list[Any]:
    """Return where the images of vLLM's input are, in no order: each has an `offset` and a `length` in tokens."""
    return list((prompt.get("mm_placeholders") or {}).get("image", ()))


async def _image_data(parts: Sequence[MediaPart], embeddings: EmbeddingsWanted | None) -> Any:
    embedded = [part for part in parts if isinstance(part, EmbeddingsPart)]
    if not embedded:
        return [part.loaded.image for part in parts if isinstance(part, ImagePart) and part.loaded]
    if embeddings is None:
        raise InvalidRequest(
            "image_embeds: this model's images cannot be sent as embeddings; send the images", param=EMBEDDINGS
        )
    return await asyncio.to_thread(_embedding_data, embeddings.checked(embedded), embeddings.dtype)


def _embedding_data(loaded: Sequence[LoadedEmbeddings], dtype: str) -> Any:
    import torch

    tensors = [torch.from_numpy(one.rows).to(getattr(torch, dtype)) for one in loaded]
    grids = [one.grid for one in loaded if one.grid is not None]
    return {EMBEDDINGS: torch.cat(tensors), GRID: torch.tensor(grids)} if grids else tensors


def _check_rows(prompt: Any, hidden_size: int) -> None:
    """Raise ImageError for an image with another number of rows than tokens: it would end the engine's process.

    An image that the engine has already is not part of the input any more.
    """
    items = (prompt.get("mm_kwargs") or {}).get("image", ())
    for place, item in zip(placeholders(prompt), items, strict=True):
        rows = None if item is None else item.get_data().get(EMBEDDINGS)
        if item is not None and (rows is None or rows.numel() != place.get_num_embeds() * hidden_size):
            raise ImageError(
                0, "the model's processor gives these embeddings another number of tokens than they have rows"
            )


def embeddings_wanted(engine: Any) -> EmbeddingsWanted | None:
    """Return what this model accepts in place of images; None if it wants more than is read here."""
    config = engine.model_config
    vision = getattr(config.hf_config, "vision_config", None)
    also = embedding_fields(engine) - {EMBEDDINGS}
    if also - {GRID}:
        logger.warning("embeddings of images are refused: this model wants %s with them", ", ".join(also))
        return None
    # Some encoders feed several layers of the language model; a row then holds what each of them gets.
    layers = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
    longest = int(config.max_model_len) - 1
    return EmbeddingsWanted(
        hidden_size=int(config.get_inputs_embeds_size()) * layers,
        most_tokens=min(longest, most_rows(engine) or longest),
        dtype=str(config.dtype).removeprefix("torch."),
        merge=int(getattr(vision, "spatial_merge_size", None) or 1) if GRID in also else None,
    )


def smallest_embeddings(wanted: EmbeddingsWanted) -> EmbeddingsPart:
    """Return embeddings of one token, to try whether the model accepts any."""
    rows = np.zeros((1, wanted.hidden_size), np.float32)
    grid = None if wanted.merge is None else (1, wanted.merge, wanted.merge)
    return EmbeddingsPart("", loaded=LoadedEmbeddings(rows, 0.0, grid, b"smallest embeddings"))
