"""What the front learns of a model, in a process that has imported nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import msgspec

from handlers.backends.rolling.model_facts import ModelQuestion, model_facts
from tests.support.shapes import ROOT

HEAVY = ["torch"] if find_spec("torchvision") else []
"""What the front imports: where torchvision is installed, images are resized with torch."""


LOAD = """
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


_WITH_FACTS = """
import shutil
from pathlib import Path
import msgspec
from handlers.backends.rolling.model_facts import ModelFacts, ModelQuestion
def told(question, folder, seconds):
    assert question == ModelQuestion(sys.argv[1], None, "auto", False)
    shutil.copytree(sys.argv[2], folder, dirs_exist_ok=True)
    return msgspec.msgpack.decode(Path(sys.argv[2], "facts").read_bytes(), type=ModelFacts)
"""


def learned(model: Path, *, asks: bool = False) -> dict[str, object]:
    """What a front learns, and which heavy modules it imports for that.

    asks: It asks a new process what transformers knows, as in a server, whose imports take seconds. Otherwise it is
    told what this process knows.
    """
    with tempfile.TemporaryDirectory() as folder:
        code = LOAD
        if not asks:
            facts = model_facts(ModelQuestion(str(model), None, "auto", False), Path(folder))
            Path(folder, "facts").write_bytes(msgspec.msgpack.encode(facts))
            code = code.replace("front =", _WITH_FACTS + "front =").replace("sys.argv[1])", "sys.argv[1], told)")
        done = subprocess.run(
            [sys.executable, "-c", code, str(model), folder], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))
