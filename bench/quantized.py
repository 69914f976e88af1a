"""What 8 bits cost in answers: the questions of examples/shapes, asked with and without option.quantize=int8.

    python -m bench.quantized --drawings 1000

Prints how many answers were right, and how many differ.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).resolve().parents[1] / "examples" / "shapes"
sys.path.insert(0, str(SHAPES))

from evaluate import SEED, Question, conversations, one_shape  # noqa: E402

from handlers import LLM, SamplingParams  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m bench.quantized",
    )
    parser.add_argument("--drawings", type=int, default=1000, help="of each sort (%(default)s)")
    drawings = parser.parse_args().drawings
    questions = [*one_shape(drawings, SEED), *conversations(drawings, SEED + 1)]
    plain, quantised = answers(questions), answers(questions, quantize="int8")
    for name, found in (("as stored", plain), ("int8", quantised)):
        right = sum(text == question.answer for text, question in zip(found, questions, strict=True))
        print(f"{name:10} {right} of {len(questions)} right, {100 * right / len(questions):.2f} %")
    print(f"{sum(a != b for a, b in zip(plain, quantised, strict=True))} answers differ")


def answers(questions: list[Question], **options: Any) -> list[str]:
    """Ask the embedded engine, greedily."""
    llm = LLM(str(SHAPES), limit_mm_per_prompt={"image": 4}, **options)
    params = SamplingParams(temperature=0, max_tokens=64)
    found = llm.chat([_messages(question) for question in questions], params, use_tqdm=False)
    llm.close()
    return [each.outputs[0].text.strip() for each in found]


def _messages(question: Question) -> list[dict[str, Any]]:
    """Return the conversation with its images in their places."""
    images = iter(question.pictures)

    def content(parts: Any) -> Any:
        if isinstance(parts, str):
            return parts
        return [{"type": "image_pil", "image_pil": next(images)} if part["type"] == "image" else part for part in parts]

    return [{**message, "content": content(message["content"])} for message in question.messages]


if __name__ == "__main__":
    main()
