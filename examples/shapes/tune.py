"""Teach the exported model more of what is said, with the vision tower as it is, and export it again.

    python examples/shapes/tune.py --out /tmp/shapes --minutes 15

For small changes of `questions.py` after the model was trained: a low learning rate, and all else as in `train.py`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from network import HERE, export
from torch.utils.data import DataLoader
from tqdm import tqdm
from train import HELD_OUT_SEED, PICTURES, Batches, attend, quick_check, rate, see, short, speak
from transformers import LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def main() -> None:
    """Tune and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to export the model to")
    parser.add_argument("--model", type=Path, default=HERE, help="the model to start from")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--peak", type=float, default=4e-4, help="highest learning rate")
    parser.add_argument("--bare", type=float, default=0.4, help="share of prompts without the chat template")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ALL_ATTENTION_FUNCTIONS.register("plain", attend)
    model = LlavaForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
    model.set_attn_implementation("plain")
    model.model.vision_tower.requires_grad_(False)
    weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
    average = {name: value.detach().clone() for name, value in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=options.peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    batches = Batches(options.seed * 1_000_003 + 900_000, bare=options.bare)
    held_out = Batches(HELD_OUT_SEED + 1, pool=PICTURES * 12, bare=0.5)
    checks = [batch for batch, _ in zip(held_out, range(8), strict=False)]
    bar = tqdm(total=round(options.minutes * 60), unit="s", mininterval=5)
    began, said = time.monotonic(), 0.0
    loader = DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=12)
    for step, batch in enumerate(loader, start=1):
        progress = (time.monotonic() - began) / (options.minutes * 60)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate(progress, options.peak)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                features = see(model, batch.levels)[1]
            logits, targets, _ = speak(model, features, batch)
            loss = (F.cross_entropy(logits, targets, reduction="none") * short(batch.targets)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        keep = min(0.998, step / (step + 20))
        torch._foreach_lerp_(list(average.values()), [value.detach() for value in weights.values()], 1 - keep)
        said += 0.02 * ((logits.argmax(-1) == targets).float().mean().item() - said)
        bar.update(round(time.monotonic() - began) - bar.n)
        bar.set_postfix(step=step, said=f"{said:.3f}", refresh=False)
    bar.close()
    model.load_state_dict({name: value.to(torch.bfloat16).float() for name, value in average.items()}, strict=False)
    print(", ".join(f"{kind} {share:.3f}" for kind, share in quick_check(model, checks).items()))
    export(model.state_dict(), options.out)


if __name__ == "__main__":
    main()
