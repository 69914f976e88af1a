"""Offline inference with vLLM behind it, in a script as people write them: no `__main__` guard, nothing closed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.support.scripts import run_script
from tests.support.shapes import IMAGES, SHAPES, tower_features

SCRIPT = """
import sys
from PIL import Image
import numpy
from handlers import LLM, ImageFeatureData, ImagePixelData, SamplingParams

shapes, images, features = sys.argv[1:]
llm = LLM(
    shapes,
    rolling_batch="vllm",
    enforce_eager=True,
    max_model_len=1024,
    kv_cache_memory_bytes=1 << 28,
    disable_log_stats=True,
    image_input_type="image_features",
    image_token_id=3,
    image_input_shape="1,64,160",
    image_feature_size=64,
)
prompt = "USER: <image>\\nWhat is the content of this image?\\nASSISTANT:"
star = Image.open(images + "/yellow-star.png")
given = [
    {"prompt": prompt, "multi_modal_data": {"image": Image.open(images + "/red-circle.png")}},
    {"prompt": prompt},
    {"prompt": prompt, "multi_modal_data": {"image": star}},
]
for output in llm.generate(given, SamplingParams(temperature=0)):
    print("ANSWER", output.outputs[0].text, "" if output.error is None else type(output.error).__name__)
parts = [{"type": "image_pil", "image_pil": star}, {"type": "text", "text": "What's in this image?"}]
two = SamplingParams(n=2, temperature=0.1, seed=1, logprobs=1)
for answer in llm.chat([{"role": "user", "content": parts}], two)[0].outputs:
    assert len(answer.logprobs) == len(answer.token_ids)
    print("ANSWER", answer.text)
old = "<image>" * 64 + "\\nUSER: What is the content of this image?\\nASSISTANT:"
for data in (ImagePixelData(star), ImageFeatureData(numpy.load(features))):
    print("ANSWER", llm.generate({"prompt": old, "multi_modal_data": data})[0].outputs[0].text)
"""


def test_a_script_without_a_guard(tmp_path: Path) -> None:
    """Also with what vLLM's pages up to 0.5 showed, and the features of an image in its place."""
    np.save(tmp_path / "features.npy", tower_features("yellow-star")[0])
    printed = run_script(tmp_path, SCRIPT, SHAPES, IMAGES, tmp_path / "features.npy")
    answers = [line.removeprefix("ANSWER ").strip() for line in printed.splitlines() if "ANSWER" in line]
    assert answers == ["a red circle", "InvalidRequest", *["a yellow star"] * 5]
