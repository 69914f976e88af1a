"""PNG plots of the results: one run over time, and memory over the images sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt


def timelines(path: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Draw one column per run: each request waiting and speaking, chunks per second, processor, memory."""
    figure, axes = plt.subplots(
        4, len(runs), figsize=(6.5 * len(runs), 10), layout="constrained", squeeze=False, sharex="col",
        height_ratios=(3, 1, 1, 1),
    )  # fmt: skip
    for column, (name, run) in enumerate(runs.items()):
        requests, chunks, cpu, memory = axes[:, column]
        spans = np.array(sorted(run["requests"])).reshape(-1, 3)
        rows = np.arange(len(spans))
        requests.hlines(rows, spans[:, 0], spans[:, 1], color="0.75", label="to the first token")
        requests.hlines(rows, spans[:, 1], spans[:, 2], color="C0", label="speaking")
        requests.set(title=name, ylabel="request")
        requests.legend(fontsize=8, loc="upper left")
        width = run["seconds"] / max(1, len(run["chunks"]))
        chunks.stairs(np.array(run["chunks"]) / width, np.arange(len(run["chunks"]) + 1) * width)
        chunks.set(ylabel="chunks/s")
        samples = np.array(run["samples"]).reshape(-1, 4)
        if len(samples) > 1:
            cpu.plot(samples[1:, 0], np.diff(samples[:, 1]) / np.diff(samples[:, 0]))
            memory.plot(samples[:, 0], samples[:, 2] / 1e6, label="front")
            memory.plot(samples[:, 0], samples[:, 3] / 1e6, label="workers")
            memory.legend(fontsize=8)
        cpu.set(ylabel="cores in use", ylim=(0, None))
        memory.set(ylabel="resident MB", xlabel="seconds", ylim=(0, None))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def memory(path: Path, images: list[int], front: list[float], workers: list[float]) -> None:
    """Draw resident memory, in MB, over the images that a server has seen."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(images, front, "o-", label="front")
    axis.plot(images, workers, "o-", label="workers")
    axis.set(xlabel="unique images", ylabel="resident MB", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
