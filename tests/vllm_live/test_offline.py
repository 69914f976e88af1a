"""Offline inference with vLLM behind it, in a script as people write them: no `__main__` guard, nothing closed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.test_shapes_live import PICTURES, SHAPES

ROOT = Path(__file__).parent.parent.parent

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
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(SHAPES), str(PICTURES)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [line.removeprefix("ANSWER ").strip() for line in done.stdout.splitlines() if "ANSWER" in line]
    assert answers == ["a red circle", "InvalidRequest", "a yellow star", "a yellow star", "a yellow star"]
