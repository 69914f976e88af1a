"""Train the model of shapes on the CPU, from nothing, and export it in the hub's format.

    python examples/shapes/train.py --out /tmp/shapes --work /tmp/shapes-work

Stops after ``--minutes`` of training or ``--steps``, writes an export every ``--every`` minutes, and goes on
from its last checkpoint when started again with the same ``--work``. A first part trains the vision tower
alone on what every patch holds; then the whole model learns the answers, with the first task beside it.
"""

from __future__ import annotations

import argparse
import collections
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from network import GRID, IMAGE_TOKENS, create, export, normalise, squeeze
from questions import WEIGHTS, Conversation, bare, converse
from tokenizer import IMAGE, PAD, tokens
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from world import BACKGROUNDS, COLORS, FINE, KINDS, PatchLabels, Scene, draw, patch_labels, sample_scene

PICTURES = 32  # per batch
POOL = 6000  # pictures kept at hand; a share of every batch's pictures is drawn anew
FRESH = 0.2
SHARES = {1: 0.5, 2: 0.22, 3: 0.14, 4: 0.14}  # batches by pictures in a conversation
# How often each kind of question is asked in training: the hard ones more often than they are in evaluation.
PRACTICE = WEIGHTS | {
    "what": 4.0,
    "what, other words": 1.2,
    "JSON": 1.6,
    "color of the image": 0.8,
    "count": 1.0,
    "color of a shape": 5.0,
    "nth image": 5.0,
    "all images": 1.6,
    "number of images": 0.6,
    "follow-up": 3.0,
}
BARE_SHARE = 0.15
HELD_OUT_SEED = 7_000_000


@dataclass
class View:
    """A scene with its picture [SIDE, SIDE, 3] in levels and what its patches hold."""

    scene: Scene
    levels: npt.NDArray[np.uint8]
    labels: PatchLabels

    @classmethod
    def make(cls, rng: random.Random) -> View:
        """Draw a random scene; one in thirty is a plain background."""
        scene = sample_scene(rng, 0 if rng.random() < 0.03 else None)
        return cls(scene, squeeze(draw(scene)), patch_labels(scene, GRID))


@dataclass
class Batch:
    """Pictures [N, SIDE, SIDE, 3], backgrounds [N] and patch labels [N, patches, ...]; ids, targets [B, T]; talks."""

    levels: torch.Tensor
    grounds: torch.Tensor
    labels: dict[str, torch.Tensor]
    ids: torch.Tensor
    targets: torch.Tensor
    talks: list[Conversation]


def pack(talks: list[tuple[Conversation, list[View]]]) -> Batch:
    """Put conversations and their pictures into one batch, padded on the right."""
    views = [conversation_views[i] for talk, conversation_views in talks for i in talk.pictures]
    rows = [tokens(talk, IMAGE_TOKENS) for talk, _ in talks]
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), PAD)
    targets = torch.full((len(rows), longest), -100)
    for i, (row, target) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        targets[i, : len(row)] = torch.tensor(target)
    return Batch(*stack(views), ids, targets, [talk for talk, _ in talks])


def stack(views: list[View]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the levels, backgrounds and patch labels of a batch."""
    return (
        torch.from_numpy(np.stack([view.levels for view in views])),
        torch.tensor([BACKGROUNDS.index(view.scene.background) for view in views]),
        {
            each.name: torch.from_numpy(np.stack([getattr(view.labels, each.name) for view in views]))
            for each in fields(PatchLabels)
        },
    )


class Batches(IterableDataset[Batch]):
    """An endless row of batches that ``seed`` fixes."""

    def __init__(self, seed: int, pool: int = POOL, bare: float = BARE_SHARE) -> None:
        """``bare``: the share of conversations that are one question without the chat template."""
        self.seed = seed
        self.pool = pool
        self.bare = bare

    def __iter__(self) -> Iterator[Batch]:
        rng = random.Random(self.seed)
        pool: list[View] = []

        def view() -> View:
            if len(pool) < self.pool and (len(pool) < PICTURES * 8 or rng.random() < 0.3):
                pool.append(View.make(rng))
                return pool[-1]
            at = rng.randrange(len(pool))
            if rng.random() < FRESH:
                pool[at] = View.make(rng)
            return pool[at]

        while True:
            # Four batches of the same number of pictures at a time, sorted by length: less padding.
            number = rng.choices(list(SHARES), list(SHARES.values()))[0]
            talks: list[tuple[Conversation, list[View]]] = []
            for _ in range(4 * (PICTURES // number)):
                views = [view() for _ in range(number)]
                scenes = [v.scene for v in views]
                if rng.random() < self.bare:
                    talks.append((bare(scenes, rng, PRACTICE), views))
                    continue
                turns = rng.choice((1, 2, 3, 4, 5, 6, 6, 7, 8, 8))
                talks.append((converse(scenes, turns, rng, weights=PRACTICE), views))
            talks.sort(key=lambda talk: len(tokens(talk[0], 1)[0]))
            size = PICTURES // number
            groups = [talks[i : i + size] for i in range(0, len(talks), size)]
            rng.shuffle(groups)
            for group in groups:
                blind = [(converse([], rng.randint(1, 4), rng), []) for _ in range(2)]
                yield pack([*group, *blind])


class Pictures(IterableDataset[Batch]):
    """An endless row of batches without conversations, for the vision tower alone; every second picture is new."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[Batch]:
        rng = random.Random(self.seed)
        pool = [View.make(rng) for _ in range(PICTURES)]
        none = torch.zeros(0, 0, dtype=torch.long)
        while True:
            for _ in range(PICTURES // 2):
                if len(pool) < POOL:
                    pool.append(View.make(rng))
                else:
                    pool[rng.randrange(POOL)] = View.make(rng)
            yield Batch(*stack(rng.sample(pool, PICTURES)), none, none, [])


class Seer(nn.Module):
    """Throw-away heads: the tower tells shapes from the ground halfway up, and at the top names and ranks them.

    Halfway up the language model a head tells which picture is which. Left to the answers alone, a model this
    small takes hours to find out that corners and order matter.
    """

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.lower, self.upper = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fine = nn.Linear(width, FINE * FINE + 2)
        self.patch = nn.Linear(width, len(KINDS) + 1 + len(COLORS) + 1 + 4)
        self.shape = nn.Linear(width, len(KINDS))
        self.ground = nn.Linear(width, len(BACKGROUNDS))
        self.rank = nn.Linear(width, 4)
        self.number = nn.Linear(text_width, 4)

    def forward(self, half: torch.Tensor, top: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss for features [N, patches, width] of two heights, and the share of patches named rightly."""
        labels = batch.labels
        owner, kind, color = labels["owner"].long(), labels["kind"].long(), labels["color"].long()
        mask, bends = self.fine(self.lower(half)).float().split((FINE * FINE, 2), dim=-1)
        loss = F.binary_cross_entropy_with_logits(mask, labels["mask"].float())
        loss = loss + 4 * (bends - labels["corners"].float()).square().mean()

        features = self.upper(top)
        sizes = (len(KINDS) + 1, len(COLORS) + 1, 4)
        kinds, colors, box = self.patch(features).float().split(sizes, dim=-1)
        covered = labels["mask"].float().mean(dim=-1)
        ranks = self.rank(features).float()
        weight = torch.where(owner == 0, 0.15, covered + 0.3)
        each = F.cross_entropy(kinds.transpose(1, 2), kind, reduction="none")
        each = each + F.cross_entropy(colors.transpose(1, 2), color, reduction="none")
        each = each + F.cross_entropy(ranks.transpose(1, 2), owner, reduction="none")
        loss = loss + (each * weight).sum() / weight.sum()
        loss = loss + 2 * (box - labels["box"].float()).abs()[owner > 0].mean()

        # The mean over a shape's own patches must tell its kind before any single patch has to.
        owned = (owner[:, None, :] == torch.arange(1, 4)[:, None]).float() * covered[:, None, :]
        there = owned.sum(dim=-1) > 0
        means = (owned / owned.sum(dim=-1, keepdim=True).clamp(min=1e-6)) @ features.float()
        wanted = torch.where(owner[:, None, :] == torch.arange(1, 4)[:, None], kind[:, None, :], 0).amax(-1) - 1
        loss = loss + F.cross_entropy(self.shape(means).float()[there], wanted[there])

        loss = loss + 0.3 * F.cross_entropy(self.ground(features.mean(dim=1)).float(), batch.grounds)
        full = covered > 0.25
        right = (kinds.argmax(-1) == kind) & (colors.argmax(-1) == color)
        return loss, right[full].float().mean()

    def count(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return the loss of telling from hidden states [B, T, text width] the number of the picture they are in."""
        pictures = ids == IMAGE
        numbers = (pictures.cumsum(dim=1) - 1) // IMAGE_TOKENS
        loss: torch.Tensor = F.cross_entropy(self.number(hidden[pictures]).float(), numbers[pictures])
        return loss


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend in bfloat16 [N, heads, T, head size] by plain products, on one core the fastest way by half.

    Text attends to what came before; rows are padded on the right, so they need no mask for it.
    """
    if mask is not None:
        raise ValueError("training passes no masks")
    batch, heads, length, size = query.shape
    query, key, value = (x.to(torch.bfloat16).reshape(-1, length, size) for x in (query, key, value))
    hidden = torch.zeros(length, length, dtype=query.dtype)
    if module.is_causal:
        hidden = torch.full_like(hidden, -1e4).triu(1)
    scores = torch.baddbmm(hidden.expand(len(query), -1, -1), query, key.transpose(1, 2), alpha=size**-0.5)
    mixed = torch.bmm(scores.softmax(dim=-1), value).view(batch, heads, length, size)
    return mixed.transpose(1, 2).contiguous(), None


def see(model: LlavaForConditionalGeneration, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return patch features [N, patches, width] of the tower's middle and top for levels [N, SIDE, SIDE, 3]."""
    told = model.model.vision_tower(normalise(levels), output_hidden_states=True)
    layers = model.config.vision_config.num_hidden_layers
    return told.hidden_states[layers // 2][:, 1:], told.last_hidden_state[:, 1:]


def speak(
    model: LlavaForConditionalGeneration, features: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits [answers, vocabulary] and targets [answers] at the places where an assistant speaks.

    The third result is the language model's hidden states [B, T, width] halfway up.
    """
    llava = model.model
    embedded = llava.language_model.embed_tokens(batch.ids)
    seen = llava.multi_modal_projector(features).to(embedded.dtype)
    where = (batch.ids == IMAGE).unsqueeze(-1)
    embedded = embedded.masked_scatter(where, seen.reshape(-1, seen.shape[-1]))
    told = llava.language_model(inputs_embeds=embedded, use_cache=False, output_hidden_states=True)
    answers = batch.targets >= 0
    logits = model.lm_head(told.last_hidden_state[answers]).float()
    middle = told.hidden_states[model.config.text_config.num_hidden_layers // 2]
    return logits, batch.targets[answers], middle


def short(targets: torch.Tensor) -> torch.Tensor:
    """Return a weight per target [answers] that makes a short answer count nearly as much as a long one.

    ``targets`` are [B, T] with -100 between answers; weights go with one over the root of an answer's length.
    """
    there = F.pad(targets >= 0, (1, 0))
    answer = (there[:, 1:] & ~there[:, :-1]).flatten().cumsum(0)[targets.flatten() >= 0]
    weight = 1 / answer.bincount()[answer].float().sqrt()
    return weight / weight.mean()


@torch.no_grad()
def quick_check(model: LlavaForConditionalGeneration, batches: list[Batch]) -> dict[str, float]:
    """Return the share of answers that greedy decoding would get right, by kind of question."""
    right: collections.Counter[str] = collections.Counter()
    total: collections.Counter[str] = collections.Counter()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets, _ = speak(model, see(model, batch.levels)[1], batch)
        hit = torch.zeros_like(batch.targets, dtype=torch.bool)
        hit[batch.targets >= 0] = logits.argmax(-1) == targets
        for row, row_hit, talk in zip(batch.targets.tolist(), hit.tolist(), batch.talks, strict=True):
            answer, ok, kinds = False, True, iter(talk.kinds)
            for target, good in zip([*row, -100], [*row_hit, False], strict=True):
                if target >= 0:
                    answer, ok = True, ok and good
                elif answer:
                    kind = next(kinds)
                    total[kind] += 1
                    right[kind] += ok
                    answer, ok = False, True
    shares = {kind: right[kind] / total[kind] for kind in sorted(total)}
    return {"all": sum(right.values()) / sum(total.values())} | shares


def rate(progress: float, peak: float) -> float:
    """Return the learning rate at ``progress`` (0 to 1): warm-up, then a cosine to 1 % of the peak."""
    if progress < 0.02:
        return peak * (progress / 0.02 + 0.01)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to export the model to")
    parser.add_argument("--work", type=Path, help="folder for checkpoints (none are kept without it)")
    parser.add_argument("--minutes", type=float, default=90.0, help="training time, over all resumed runs")
    parser.add_argument("--see-minutes", type=float, default=15.0, help="of it, for the vision tower alone")
    parser.add_argument("--steps", type=int, help="stop after so many steps, whatever the time")
    parser.add_argument("--every", type=float, default=10.0, help="minutes between exports and checkpoints")
    parser.add_argument("--peak", type=float, default=1.3e-3, help="highest learning rate")
    parser.add_argument("--extra", type=int, default=3, help="batches for the tower alone beside every full one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--init-only", action="store_true", help="export random weights and stop")
    return parser.parse_args()


def main() -> None:
    """Train and export."""
    options = parse()
    torch.set_num_threads(options.threads)
    model = create(options.seed)
    if options.init_only:
        export(model.state_dict(), options.out)
        return
    ALL_ATTENTION_FUNCTIONS.register("plain", attend)
    model.set_attn_implementation("plain")
    seer = Seer(model.config.vision_config.hidden_size, model.config.text_config.hidden_size)
    weights = dict(model.named_parameters())
    average = {k: v.detach().clone() for k, v in weights.items()}
    trained = [*model.parameters(), *seer.parameters()]
    decay = [p for p in trained if p.ndim > 1]
    plain = [p for p in trained if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.peak, betas=(0.9, 0.98), fused=True)
    step, spent = 0, 0.0  # spent: seconds of training

    checkpoint = options.work / "checkpoint.pt" if options.work else None
    if checkpoint and checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        seer.load_state_dict(state["seer"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, spent = state["average"], state["step"], state["spent"]

    loader = DataLoader(
        Batches(options.seed * 1_000_003 + step + 1), batch_size=None, num_workers=1, prefetch_factor=12
    )
    pictures = Pictures(options.seed * 1_000_003 + step + 500_000)
    more = iter(DataLoader(pictures, batch_size=None, num_workers=1, prefetch_factor=12))
    held_out = Batches(HELD_OUT_SEED, pool=PICTURES * 12)
    checks = [batch for batch, _ in zip(held_out, range(8), strict=False)]

    def save() -> None:
        """Write a checkpoint, check the averaged weights and export them."""
        if checkpoint:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            part = checkpoint.with_suffix(".part")
            torch.save(
                {"model": model.state_dict(), "seer": seer.state_dict(), "optimizer": optimizer.state_dict()}
                | {"average": average, "step": step, "spent": spent},
                part,
            )
            part.rename(checkpoint)
        current = {k: v.detach().clone() for k, v in weights.items()}
        model.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in average.items()}, strict=False)
        shares = quick_check(model, checks)
        model.load_state_dict(current, strict=False)
        tqdm.write(f"step {step}, {spent / 60:.1f} min: " + ", ".join(f"{k} {v:.3f}" for k, v in shares.items()))
        export(average, options.out)

    def learn(loss: torch.Tensor) -> None:
        """Take one step down the gradient of ``loss``."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in trained if p.grad is not None], 1.0)
        optimizer.step()

    bar = tqdm(total=round(options.minutes * 60), initial=round(spent), unit="s", smoothing=0.05, mininterval=5)
    losses = {"see": 2.0, "say": 6.0, "seen": 0.0, "said": 0.0}
    due = spent + options.every * 60
    before = time.monotonic()
    for batch in loader:
        if spent >= options.minutes * 60 or (options.steps is not None and step >= options.steps):
            break
        alone = spent < options.see_minutes * 60
        if alone:
            progress, share = spent / (options.see_minutes * 60), 0.5
            lr = options.peak * min(1.0, 0.02 + spent / 60)
        else:
            progress = (spent / 60 - options.see_minutes) / (options.minutes - options.see_minutes)
            lr = rate(progress, options.peak)
            share = max(0.25, 0.5 * (1 - progress))
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            half, features = see(model, batch.levels)
            loss, seen = seer(half, features, batch)
            losses["see"] += 0.02 * (loss.item() - losses["see"])
            losses["seen"] += 0.02 * (seen.item() - losses["seen"])
            loss = loss * share
            if not alone:
                logits, targets, middle = speak(model, features, batch)
                say = (F.cross_entropy(logits, targets, reduction="none") * short(batch.targets)).mean()
                losses["say"] += 0.02 * (say.item() - losses["say"])
                losses["said"] += 0.02 * ((logits.argmax(-1) == targets).float().mean().item() - losses["said"])
                loss = loss + say + 0.3 * seer.count(middle, batch.ids)
        learn(loss)
        for _ in range(options.extra if not alone else 0):
            extra = next(more)
            with torch.autocast("cpu", torch.bfloat16):
                learn(seer(*see(model, extra.levels), extra)[0] * share)
        step += 1
        keep = min(0.9985, step / (step + 20))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in weights.values()], 1 - keep)
        now = time.monotonic()
        spent += now - before
        bar.update(round(spent) - bar.n)
        bar.set_postfix(step=step, lr=f"{lr:.1e}", **{k: f"{v:.3f}" for k, v in losses.items()}, refresh=False)
        if spent >= due:
            save()
            due = spent + options.every * 60
            now = time.monotonic()
        before = now
    bar.close()
    save()


if __name__ == "__main__":
    main()
