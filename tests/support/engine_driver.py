"""Drives an engine in this process, step by step, and asks transformers what the right tokens are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from engine.config import EngineConfig
from engine.engine import Engine
from engine.families.preprocessor import Preprocessor
from engine.loader import load_preprocessor
from engine.messages import Add, ImageInput, Output, TensorData
from engine.sampling_params import SamplingParams

EOS = (257, 263)
# A to Z in the vocabulary of every tiny model. Otherwise a random model may write nothing but broken characters.
CAPITALS = tuple(range(32, 58))


def random_image(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    size = random.integers(8, 60, 2)
    return Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8))


@dataclass
class Prompt:
    """Text token ids with images (by seed) standing between them."""

    items: list[int | Image.Image]

    def add(self, preprocessor: Preprocessor[Any] | None, params: SamplingParams, seed: int = 0) -> Add:
        token_ids: list[int] = []
        images: list[ImageInput] = []
        variant = 0 if preprocessor is None else preprocessor.variant(len(self.images))
        for item in self.items:
            if isinstance(item, int):
                token_ids.append(item)
                continue
            assert preprocessor is not None
            prepared = preprocessor.prepare(item, variant)
            images.append(
                ImageInput(
                    digest=item.tobytes()[:64] + repr((item.size, variant)).encode(),
                    offset=len(token_ids),
                    length=len(prepared.token_ids),
                    tensors={name: TensorData.pack(array) for name, array in prepared.tensors.items()},
                    is_embed=prepared.is_embed,
                )
            )
            token_ids += prepared.token_ids
        add = Add(0, token_ids, params, [seed], EOS, images)
        if preprocessor is not None:
            positions, add.position_delta = preprocessor.positions(len(token_ids), images)
            add.positions = None if positions is None else TensorData.pack(positions)
        return add

    @property
    def images(self) -> list[Image.Image]:
        return [item for item in self.items if not isinstance(item, int)]


class Oracle:
    """transformers' own `generate`, one request at a time, in float32, on pixels of its own image processor.

    inputs: what `generate` is given for images beside the token ids; by default all that the processor returns.
    """

    def __init__(
        self,
        path: Path,
        inputs: Callable[[Any, list[Image.Image], torch.Tensor], dict[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        self.preprocessor = load_preprocessor(str(path))
        text_only = self.preprocessor is None
        loader = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
        self.model: PreTrainedModel = loader.from_pretrained(path, dtype=torch.float32, **options).eval()
        self.processor = None if text_only else AutoImageProcessor.from_pretrained(path)
        self._inputs = inputs or (lambda processor, images, _: dict(processor(images, return_tensors="pt")))

    def inputs(self, prompt: Prompt, ids: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of the model beside the token ids."""
        return self._inputs(self.processor, prompt.images, ids) if prompt.images else {}

    @torch.inference_mode()
    def generate(self, prompt: Prompt, max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
        ids = torch.tensor([prompt.add(self.preprocessor, SamplingParams()).token_ids])
        # Without a configuration of its own, a call searches the model's for old parameters: a third of its time.
        out = self.model.generate(
            ids, generation_config=self.model.generation_config, attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens, do_sample=False, eos_token_id=None if ignore_eos else list(EOS),
            pad_token_id=258, **self.inputs(prompt, ids),
        )  # fmt: skip
        return out[0, ids.shape[1] :].tolist()

    @torch.inference_mode()
    def logits(self, prompt: Prompt) -> torch.Tensor:
        """[tokens, vocabulary] of the prompt."""
        ids = torch.tensor([prompt.add(self.preprocessor, SamplingParams()).token_ids])
        mask = torch.ones_like(ids)
        logits: torch.Tensor = self.model(ids, attention_mask=mask, **self.inputs(prompt, ids)).logits[0]
        return logits


@dataclass
class Result:
    token_ids: list[int] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)

    @property
    def finish(self) -> str | None:
        return self.outputs[-1].finish if self.outputs else None


def load_engine(path: Path, **settings: object) -> Engine:
    defaults: dict[str, object] = {"dtype": "float32", "kv_cache_bytes": 8 << 20}
    return Engine.load(EngineConfig(model_path=str(path), **{**defaults, **settings}))  # type: ignore[arg-type]


def collect(results: dict[int, Result], outputs: list[Output]) -> None:
    for output in outputs:
        result = results.setdefault(output.request_id, Result())
        result.outputs.append(output)
        result.token_ids += output.token_ids


def run_all(engine: Engine, adds: list[Add], *, max_steps: int = 10_000) -> dict[int, Result]:
    """All requests at once, to their ends."""
    results: dict[int, Result] = {}
    for number, add in enumerate(adds):
        add.request_id = number
        guides = None
        if add.grammar is not None and engine.guidance is not None:
            guides = engine.guidance.build(add.grammar, len(add.seeds))
        collect(results, engine.add(add, guides))
    for _ in range(max_steps):
        if not engine.has_work:
            return results
        collect(results, engine.step())
    raise AssertionError("the engine did not finish")
