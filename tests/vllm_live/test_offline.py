"""Offline inference with vLLM behind it, in a script as people write them: no `__main__` guard, nothing closed."""

from __future__ import annotations

from pathlib import Path

from tests.scripts import run_script
from tests.test_shapes_live import PICTURES, SHAPES

SCRIPT = """
import sys
from PIL import Image
from handlers import LLM, SamplingParams

shapes, pictures = sys.argv[1:]
llm = LLM(
    shapes,
    rolling_batch="vllm",
    enforce_eager=True,
    max_model_len=1024,
    kv_cache_memory_bytes=1 << 28,
    disable_log_stats=True,
)
prompt = "USER: <image>\\nWhat is the content of this image?\\nASSISTANT:"
star = Image.open(pictures + "/yellow-star.png")
given = [
    {"prompt": prompt, "multi_modal_data": {"image": Image.open(pictures + "/red-circle.png")}},
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
"""


def test_a_script_without_a_guard(tmp_path: Path) -> None:
    printed = run_script(tmp_path, SCRIPT, SHAPES, PICTURES)
    answers = [line.removeprefix("ANSWER ").strip() for line in printed.splitlines() if "ANSWER" in line]
    assert answers == ["a red circle", "InvalidRequest", "a yellow star", "a yellow star", "a yellow star"]
