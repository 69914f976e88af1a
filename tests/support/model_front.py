"""What the front learns of a model, in a process that has imported nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.support.shapes import ROOT

HEAVY = ["torch"] if find_spec("torchvision") else []
"""What the front imports: where torchvision is installed, images are resized with torch."""


_LOAD = """
import json, sys
from handlers.backends.rolling.model_front import ModelFront
from properties.settings import Settings
front = ModelFront.load(Settings(), sys.argv[1])
text = front.text
from PIL import Image
image = front.preprocessor.prepare(Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 20).convert("RGB"))
print(json.dumps({
    "heavy": sorted({"torch", "transformers.modeling_utils"} & sys.modules.keys()),
    "eos": text.eos_token_ids, "vocabulary": text.vocab_size, "ids": text.tokenizer("a red circle").input_ids,
    "kind": type(text.tokenizer).__name__, "tokens": len(image.token_ids),
    "pixels": float(image.tensors["pixel_values"].sum()), "fingerprint": front.preprocessor.fingerprint.hex(),
}))
"""


def learned(model: Path) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(model)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))
