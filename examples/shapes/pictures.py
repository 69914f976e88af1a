"""Draw the sample pictures in ``pictures/``, each named after what it shows.

python examples/shapes/pictures.py
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from world import GROUNDS, SHADES, Scene, draw, sample_scene

FOLDER = Path(__file__).resolve().parent / "pictures"
SEED = 8_000_000
WANTED = {
    "red-circle.png": ("a red circle", "white"),
    "green-triangle.png": ("a green triangle", "gray"),
    "yellow-star.png": ("a yellow star", "blue"),
    "black-cross.jpg": ("a black cross", "pink"),
    "orange-star-and-blue-square.jpg": ("an orange star and a blue square", "white"),
    "white-square-and-red-triangle.png": ("a white square and a red triangle", "black"),
    "red-circle-and-blue-square-and-green-star.png": (
        "a red circle and a blue square and a green star",
        "white",
    ),
}


def find(name: str, background: str, rng: random.Random) -> Scene:
    """Return a scene of 160 to 400 pixels with these shapes in pure colours on this background."""
    nouns = [phrase.split()[1:] for phrase in name.split(" and ")]
    while True:
        scene = sample_scene(rng, len(nouns))
        fits = min(scene.width, scene.height) >= 160 and max(scene.width, scene.height) <= 400
        if fits and [shape.kind for shape in scene.shapes] == [kind for _, kind in nouns]:
            shapes = tuple(
                replace(shape, color=color, rgb=SHADES[color][0], outline=None)
                for shape, (color, _) in zip(scene.shapes, nouns, strict=True)
            )
            finish = replace(scene.finish, noise=0.0)
            painted = replace(scene, shapes=shapes, background=background, finish=finish)
            return replace(painted, ground=GROUNDS[background][0])


def read(file: str) -> Image.Image:
    """Return one of the pictures from its file."""
    with Image.open(FOLDER / file) as picture:
        return picture.convert("RGB")


def ask(question: str = "What is this an image of?") -> list[dict[str, Any]]:
    """Return a conversation that asks ``question`` about one picture."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def main() -> None:
    """Draw all of them."""
    FOLDER.mkdir(exist_ok=True)
    for i, (file, (name, background)) in enumerate(WANTED.items()):
        draw(find(name, background, random.Random(SEED + i))).save(FOLDER / file)


if __name__ == "__main__":
    main()
