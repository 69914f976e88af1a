"""The model in the repository, and images of which it knows the names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
"""The repository's own folder."""

SHAPES = ROOT / "examples" / "shapes"
IMAGES = SHAPES / "pictures"


def circle(color: str, background: str = "white", size: tuple[int, int] = (320, 240)) -> Image.Image:
    image = Image.new("RGB", size, background)
    width, height = size
    radius = min(size) * 0.3
    box = (width / 2 - radius, height / 2 - radius, width / 2 + radius, height / 2 + radius)
    ImageDraw.Draw(image).ellipse(box, fill=color)
    return image


def square(color: str, background: str = "white") -> Image.Image:
    image = Image.new("RGB", (200, 200), background)
    ImageDraw.Draw(image).rectangle((60, 60, 140, 140), fill=color)
    return image


def drawing(name: str) -> Image.Image:
    return Image.open(IMAGES / f"{name}.png")


def tower_pixels(name: str) -> torch.Tensor:
    """What the model's processor makes of an image: [1, 3, 96, 96]."""
    from transformers import AutoImageProcessor

    processor: Any = AutoImageProcessor.from_pretrained(SHAPES, backend="pil")
    tensor: torch.Tensor = processor(drawing(name).convert("RGB"), return_tensors="pt")["pixel_values"]
    return tensor


def tower_features(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the vision tower makes of it, [1, 64, 160], and what the projector makes of that, [1, 64, 128]."""
    import torch
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(SHAPES, dtype=torch.float32).model
    with torch.inference_mode():
        seen = model.vision_tower(tower_pixels(name), output_hidden_states=True).hidden_states[-1][:, 1:]
        return seen, model.multi_modal_projector(seen)
