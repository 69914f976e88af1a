"""Sends thousands of unique images, and checks whether the server's memory stays constant.

    python -m bench.memory

Exits with 1 if it does not: if, once the caches are full, the front end or its workers keep growing by more
than --slope MB per 1,000 images, or if the front end ever exceeds --front MB.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
from tqdm import tqdm

from bench import load, plots, report
from bench.run import add_model_arguments, complain, results_folder, save, server
from bench.servers import MB

BATCH = 250


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m bench.memory",
    )
    add_model_arguments(parser)
    parser.add_argument("--count", type=int, default=10000, help="images (%(default)s)")
    parser.add_argument("--skip", type=int, help="first images not judged, which fill the caches (half of them)")
    parser.add_argument("--side", type=int, default=512, help="of an image, in pixels (%(default)s)")
    parser.add_argument("--slope", type=float, default=5.0, help="MB per 1,000 images (%(default)s)")
    parser.add_argument("--front", type=float, default=500.0, help="MB (%(default)s)")
    arguments = parser.parse_args()
    out = results_folder("memory")
    one = load.Load(requests=BATCH, streams=16, width=arguments.side, height=arguments.side, tokens=8, warmup=0)
    seen, front, workers = [], [], []
    with server(arguments, out) as target:
        for turn in tqdm(range(arguments.count // BATCH), "batches"):
            batch = dataclasses.replace(one, seed=turn)
            run = load.run(batch, target)
            complain({f"batch {turn + 1}": report.summary(run, [])})
            last = target.samples[-1]
            seen.append(BATCH * (turn + 1))
            front.append(last.front / MB)
            workers.append(last.workers / MB)
    skip = arguments.count // 2 if arguments.skip is None else arguments.skip
    judged = [place for place, count in enumerate(seen) if count >= skip]
    slopes = {name: _slope(seen, values, judged) for name, values in (("front", front), ("workers", workers))}
    save(out / "results.json", {
        "machine": report.machine(), "images": seen, "front_mb": front, "workers_mb": workers, "mb_per_1000": slopes,
    })  # fmt: skip
    plots.memory(out / "memory.png", seen, front, workers)
    for count, one_front, one_workers in zip(seen, front, workers, strict=True):
        print(f"{count:6d} images: front {one_front:7.1f} MB, workers {one_workers:7.1f} MB")
    print(f"front {slopes['front']:+.2f}, workers {slopes['workers']:+.2f} MB per 1,000 images; {out}")
    wrong = [f"{name} grows by {slope:.1f} MB per 1,000 images, more than {arguments.slope:g}"
             for name, slope in slopes.items() if slope > arguments.slope]  # fmt: skip
    if max(front) > arguments.front:
        wrong.append(f"the front process took {max(front):.0f} MB, more than {arguments.front:g}")
    if wrong:
        raise SystemExit("; ".join(wrong))


def _slope(seen: list[int], values: list[float], judged: list[int]) -> float:
    if len(judged) < 2:
        return 0.0
    line = np.polyfit([seen[i] / 1000 for i in judged], [values[i] for i in judged], 1)
    return float(line[0])


if __name__ == "__main__":
    main()
