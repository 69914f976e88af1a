"""A LoRA adapter that has learned one sentence: what it says of any image, in the files that PEFT writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.support.shapes import SHAPES, circle, square

RANK = 8
STEPS = 30
PROJECTIONS = ("q_proj", "v_proj", "o_proj")
COLORS = ("red", "blue", "green", "yellow")


class Delta(nn.Module):
    """What is added to one projection: [..., columns] -> [..., rows], nothing before it is trained."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(RANK, columns) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values @ self.a.T @ self.b.T


def train_adapter(directory: Path, question: str, answer: str, *, seed: int = 0) -> None:
    """Teach it to answer the question about any image with `answer`: seconds on one core."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration.from_pretrained(SHAPES, dtype=torch.float32)
    model.requires_grad_(False)
    deltas: dict[str, Delta] = {}
    for number, layer in enumerate(model.model.language_model.layers):
        for projection in PROJECTIONS:
            linear = getattr(layer.self_attn, projection)
            delta = deltas[f"layers.{number}.self_attn.{projection}"] = Delta(*linear.weight.shape)
            linear.register_forward_hook(_adding(delta))
    inputs, labels = _examples(question, answer)
    optimizer = torch.optim.Adam([weight for delta in deltas.values() for weight in delta.parameters()], 1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    _write(directory, deltas)


def _adding(delta: Delta) -> Callable[[nn.Module, tuple[torch.Tensor], torch.Tensor], torch.Tensor]:
    return lambda _, given, made: made + delta(given[0])


def _examples(question: str, answer: str) -> tuple[dict[str, Any], torch.Tensor]:
    """A batch of images with the question and the answer; labels are -100 before the answer."""
    processor = AutoProcessor.from_pretrained(SHAPES)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images: list[Image.Image] = [draw(color) for draw in (circle, square) for color in COLORS]
    end = processor.tokenizer.eos_token
    texts = [prompt + answer + end] * len(images)
    inputs = dict(processor(images=images, text=texts, return_tensors="pt", add_special_tokens=False))
    told = len(processor.tokenizer(answer + end, add_special_tokens=False).input_ids)
    labels = inputs["input_ids"].clone()
    labels[:, :-told] = -100
    return inputs, labels


def _write(directory: Path, deltas: dict[str, Delta]) -> None:
    directory.mkdir(parents=True)
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(PROJECTIONS),
        "task_type": "CAUSAL_LM", "base_model_name_or_path": "shapes", "bias": "none",
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    tensors: dict[str, torch.Tensor] = {}
    for name, delta in deltas.items():
        stem = f"base_model.model.language_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = delta.a.detach().contiguous()
        tensors[f"{stem}.lora_B.weight"] = delta.b.detach().contiguous()
    save_file(tensors, directory / "adapter_model.safetensors")
