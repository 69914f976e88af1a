"""Embeddings in place of images as vLLM takes them, and what it must be spared: it checks less than it needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from handlers.backends.embeddings import EmbeddingsWanted
from handlers.backends.vllm.compat import ImageProcessing
from handlers.backends.vllm.prompts.rendered import placeholders, prepared
from handlers.request import EmbeddingsPart, LoadedEmbeddings

logger = logging.getLogger(__name__)

ROWS, GRID = "image_embeds", "image_grid_thw"


def embeddings_wanted(engine: Any) -> EmbeddingsWanted | None:
    """What this model takes; None where it wants to know more than is read here."""
    config = engine.model_config
    vision = getattr(config.hf_config, "vision_config", None)
    merge = getattr(vision, "spatial_merge_size", None)
    processing = ImageProcessing(engine)
    also = processing.embedding_fields - {ROWS}
    if also - {GRID}:
        logger.warning("embeddings of images are refused: this model wants %s with them", ", ".join(also))
        return None
    # Some models' encoders feed several layers of the language model; a row then holds what each of them gets.
    layers = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
    longest = int(config.max_model_len) - 1
    return EmbeddingsWanted(
        hidden_size=int(config.get_inputs_embeds_size()) * layers,
        most_tokens=min(longest, processing.most_rows or longest),
        dtype=str(config.dtype).removeprefix("torch."),
        merge=int(merge or 1) if GRID in also else None,
    )


def embedding_data(loaded: Sequence[LoadedEmbeddings], dtype: str) -> Any:
    """The `image` of vLLM's `multi_modal_data`. Copies all numbers: run it in a thread."""
    import torch

    tensors = [torch.from_numpy(one.rows).to(getattr(torch, dtype)) for one in loaded]
    grids = [one.grid for one in loaded if one.grid is not None]
    if not grids:
        return tensors
    return {ROWS: torch.cat(tensors), GRID: torch.tensor(grids)}


def smallest(wanted: EmbeddingsWanted) -> EmbeddingsPart:
    """The embeddings of an image of one token, to try whether the model takes them at all."""
    rows = np.zeros((1, wanted.hidden_size), np.float32)
    grid = None if wanted.merge is None else (1, wanted.merge, wanted.merge)
    return EmbeddingsPart("", loaded=LoadedEmbeddings(rows, 0.0, grid, b"smallest embeddings"))


def misplaced(prompt: Any, hidden_size: int) -> str | None:
    """Why vLLM's own input would not do: a place in the prompt that has not as many rows as tokens.

    Such an input ends the engine's process. What the engine has already is not looked at again.
    """
    for place, item in zip(placeholders(prompt), prepared(prompt), strict=True):
        rows = None if item is None else item.get_data().get(ROWS)
        if item is not None and (rows is None or rows.numel() != place.get_num_embeds() * hidden_size):
            return "the model's processor gives these embeddings another number of tokens than they have rows"
    return None
