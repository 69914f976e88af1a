"""Each model family on the embedded engine and with transformers' `generate`, in one process and one run.

16 requests at a time, each with one image and an answer of 8 to 120 tokens, on the small random models of the
tests. `generate` gets them as batches of 16 prompts of equal length, so without padding, and runs each batch
to the end of its longest answer. Both sides take turns, and the medians are compared.

    python -m bench.families --rounds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from handlers.request import RequestSampling
from tests.support import (
    tiny_fuyu,
    tiny_gemma,
    tiny_llava_onevision,
    tiny_mllama,
    tiny_pixtral,
    tiny_qwen_vl,
    tiny_tiles,
)
from tests.support.engine_driver import Oracle, Prompt, load_engine, run_all
from tests.support.models import make_llava
from tests.support.tiny_chameleon import make_chameleon
from tests.support.tiny_fuyu import make_fuyu
from tests.support.tiny_gemma import make_gemma3, make_paligemma
from tests.support.tiny_llava_next import make_llava_next
from tests.support.tiny_llava_onevision import make_llava_onevision
from tests.support.tiny_mllama import make_mllama
from tests.support.tiny_pixtral import make_pixtral
from tests.support.tiny_qwen_vl import make_qwen_vl
from tests.support.tiny_tiles import make_idefics3, make_internvl

STREAMS, REQUESTS = 16, 48
SHORTEST, LONGEST = 8, 120
WIDTH, HEIGHT = 96, 72

Inputs = Callable[[Any, list[Image.Image], torch.Tensor], dict[str, Any]]

FAMILIES: dict[str, tuple[Callable[[Path], Path], Inputs | None]] = {
    "llava": (make_llava, None),
    "chameleon": (make_chameleon, None),
    "fuyu": (make_fuyu, tiny_fuyu.patches_of),
    "gemma3": (make_gemma3, tiny_gemma.inputs),
    "idefics3": (make_idefics3, None),
    "internvl": (make_internvl, tiny_tiles.inputs),
    "llava_next": (make_llava_next, None),
    "llava_onevision": (make_llava_onevision, tiny_llava_onevision.inputs),
    "mllama": (make_mllama, tiny_mllama.inputs),
    "paligemma": (make_paligemma, tiny_gemma.inputs),
    "pixtral": (make_pixtral, tiny_pixtral.inputs),
    "qwen2_vl": (make_qwen_vl, tiny_qwen_vl.inputs),
    "qwen2_5_vl": (lambda path: make_qwen_vl(path, "qwen2_5_vl"), tiny_qwen_vl.inputs),
    "qwen3_vl": (lambda path: make_qwen_vl(path, "qwen3_vl"), tiny_qwen_vl.inputs),
    "smolvlm": (lambda path: make_idefics3(path, "smolvlm"), None),
}
"""Phi-3 Vision is missing, because transformers has no `generate` for it."""


@dataclass
class Measured:
    """Results for a family.

    Attributes:
        family: Name of the family.
        ours: Requests per second of the embedded engine, the median over the rounds.
        generate: Requests per second of `generate`, the median over the rounds.
        ratio: The former divided by the latter.
        prepared: Images prepared per second by one thread.
        tokens_per_image: Tokens of an image.
    """

    family: str
    ours: float
    generate: float
    ratio: float
    prepared: float
    tokens_per_image: int


def measure(family: str, rounds: int, folder: Path) -> Measured:
    make, inputs = FAMILIES[family]
    path = make(folder / family)
    oracle = Oracle(path, inputs)
    assert oracle.preprocessor is not None
    random = np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)) for _ in range(REQUESTS)
    ]
    started = time.perf_counter()
    prepared = [oracle.preprocessor.prepare(image) for image in images]
    preparing = time.perf_counter() - started
    prompts = [Prompt([image, 65, number, *range(66, 86)]) for number, image in enumerate(images)]
    lengths = [int(length) for length in random.integers(SHORTEST, LONGEST + 1, REQUESTS)]
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(REQUESTS / _engine(path, oracle, prompts, lengths))
        batches = [lengths[start : start + STREAMS] for start in range(0, REQUESTS, STREAMS)]
        theirs.append(REQUESTS / sum(_generate(oracle, prompts[0], max(batch)) for batch in batches))
    mine, other = statistics.median(ours), statistics.median(theirs)
    tokens = len(prepared[0].token_ids)
    return Measured(family, mine, other, mine / other, REQUESTS / preparing, tokens)


def _engine(path: Path, oracle: Oracle, prompts: list[Prompt], lengths: list[int]) -> float:
    """Return seconds for all prompts, 16 at a time, with a new engine each time, so that nothing is cached."""
    engine = load_engine(path, max_num_seqs=STREAMS, kv_cache_bytes=256 << 20)
    engine.warm_up()
    adds = [
        prompt.add(oracle.preprocessor, RequestSampling(temperature=0.0, max_tokens=length, ignore_eos=True))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    started = time.perf_counter()
    run_all(engine, adds)
    return time.perf_counter() - started


@torch.inference_mode()
def _generate(oracle: Oracle, prompt: Prompt, length: int) -> float:
    """Seconds for one batch of 16 equal prompts and answers of that length."""
    ids = torch.tensor([prompt.add(oracle.preprocessor, RequestSampling()).token_ids])
    batch = {
        name: value.repeat(STREAMS, *[1] * (value.ndim - 1))
        for name, value in {"input_ids": ids, **oracle.inputs(prompt, ids)}.items()
    }
    mask = torch.ones_like(batch["input_ids"])
    started = time.perf_counter()
    oracle.model.generate(
        **batch, attention_mask=mask, max_new_tokens=length, min_new_tokens=length, do_sample=False,
        eos_token_id=None, pad_token_id=258,
    )  # fmt: skip
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("families", nargs="*", default=sorted(FAMILIES), help="all of them by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("bench/results/families.json"))
    options = parser.parse_args()
    results = []
    print(f"{'family':16}{'requests/s':>12}{'generate':>12}{'ratio':>8}{'images/s':>10}{'tokens':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for family in options.families:
            found = measure(family, options.rounds, Path(folder))
            results.append(asdict(found))
            print(
                f"{family:16}{found.ours:12.1f}{found.generate:12.1f}{found.ratio:8.2f}{found.prepared:10.0f}"
                f"{found.tokens_per_image:8}",
                flush=True,
            )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
