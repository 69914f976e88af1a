"""Ask the model about held-out drawings, print exact answers per kind of question, fail under the goals.

    python examples/shapes/evaluate.py

Everything goes the way of a request: the picture through the image processor, the conversation through the
chat template, the answer from greedy decoding. The scenes come from a seed that training never draws from.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from questions import WHAT_DOCS, converse, what
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from world import Scene, draw, sample_scene

HERE = Path(__file__).resolve().parent
SEED = 9_000_000
ONE_SHAPE = "What is this an image of? (one shape)"
GOALS = {ONE_SHAPE: 0.99, "all kinds of question": 0.97}


@dataclass(frozen=True)
class Question:
    """A conversation up to a question, its pictures, the right answer and the kind of question."""

    kind: str
    messages: list[dict[str, Any]]
    pictures: list[Image.Image]
    answer: str


def one_shape(drawings: int, seed: int) -> Iterator[Question]:
    """Ask "What is this an image of?" about as many drawings of one shape."""
    rng = random.Random(seed)
    for _ in range(drawings):
        scene = sample_scene(rng, 1)
        parts = [{"type": "image"}, {"type": "text", "text": WHAT_DOCS[0]}]
        yield Question(ONE_SHAPE, [{"role": "user", "content": parts}], [draw(scene)], what(scene))


def conversations(drawings: int, seed: int) -> Iterator[Question]:
    """Ask every question of random conversations that show every drawing once, one to four at a time."""
    rng = random.Random(seed)
    left = drawings
    while left:
        number = min(left, rng.choices((1, 2, 3, 4), (0.6, 0.2, 0.1, 0.1))[0])
        left -= number
        scenes: list[Scene] = [sample_scene(rng) for _ in range(number)]
        drawn = [draw(scene) for scene in scenes]
        talk = converse(scenes, rng.randint(2, 6), rng)
        kinds = iter(talk.kinds)
        shown = 0
        for i, message in enumerate(talk.messages):
            if message["role"] == "assistant":
                pictures = [drawn[at] for at in talk.pictures[:shown]]
                yield Question(next(kinds), talk.messages[:i], pictures, message["content"])
            elif not isinstance(message["content"], str):
                shown += sum(part["type"] == "image" for part in message["content"])
    for _ in range(drawings // 20):
        talk = converse([], 1, rng)
        kind, answer = talk.kinds[-1], talk.messages[-1]["content"]
        yield Question(kind, talk.messages[:-1], [], answer)


class Model:
    """A model folder, ready to answer."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()

    @torch.no_grad()
    def answer(self, questions: list[Question]) -> list[str]:
        """Answer a few questions at once by greedy decoding."""
        texts = [self.processor.apply_chat_template(q.messages, add_generation_prompt=True) for q in questions]
        pictures = [picture for q in questions for picture in q.pictures]
        inputs = self.processor(text=texts, images=pictures or None, padding=True, return_tensors="pt")
        if pictures:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        ids = self.model.generate(**inputs, max_new_tokens=100, do_sample=False)
        told = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [str(text) for text in told]


def ask(model: Model, questions: list[Question], batch: int, bar: bool = True) -> list[str]:
    """Answer all questions, those of similar length together; answers come in the questions' order."""
    order = sorted(range(len(questions)), key=lambda i: (questions[i].kind, len(questions[i].pictures)))
    answers = [""] * len(questions)
    starts = range(0, len(order), batch)
    for start in tqdm(starts, unit="batch", disable=not bar):
        some = order[start : start + batch]
        for i, text in zip(some, model.answer([questions[i] for i in some]), strict=True):
            answers[i] = text
    return answers


def shares(questions: list[Question], answers: list[str]) -> dict[str, tuple[int, int]]:
    """Return how many answers are exact, of how many, per kind and over all kinds of question."""
    table: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for question, answer in zip(questions, answers, strict=True):
        # Small talk is no question about pictures, and single shapes have a goal of their own.
        alone = question.kind in (ONE_SHAPE, "chat")
        rows = [question.kind] if alone else [question.kind, "all kinds of question"]
        for row in rows:
            table[row][0] += answer == question.answer
            table[row][1] += 1
    return {kind: (table[kind][0], table[kind][1]) for kind in sorted(table, key=lambda k: (k in GOALS, k))}


def main() -> int:
    """Evaluate and print; return 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE, help="the model's folder")
    parser.add_argument("--drawings", type=int, default=1000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--failures", type=int, default=0, help="print so many wrong answers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = Model(options.model, getattr(torch, options.dtype))
    questions = [
        *one_shape(options.drawings, options.seed),
        *conversations(options.drawings, options.seed + 1),
    ]
    answers = ask(model, questions, options.batch)
    wrong = [(q, a) for q, a in zip(questions, answers, strict=True) if a != q.answer]
    random.Random(0).shuffle(wrong)
    for question, answer in wrong[: options.failures]:
        print(f"{question.kind}: {question.messages[-1]['content']}\n  {answer!r}, not {question.answer!r}")
    table = shares(questions, answers)
    for kind, (right, total) in table.items():
        goal = f"  (goal {GOALS[kind]:.0%})" if kind in GOALS else ""
        print(f"{kind:<40} {right:>5} / {total:<5} {right / total:7.2%}{goal}")
    return int(any(table[kind][0] < goal * table[kind][1] for kind, goal in GOALS.items()))


if __name__ == "__main__":
    sys.exit(main())
