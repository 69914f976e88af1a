"""How far one front carries: throughput and latency with 1, 2, 4 and 8 replicas whose engines cost nothing.

    python -m bench.scale
    python -m bench.scale --workloads streams --replicas 8 --step-ms 20 --batch 64

Each replica is `bench.stub_engine` in a process of its own: a step takes a fixed time and gives each of up to
--batch requests a token. What is measured is the front (HTTP, prompts, images, routing, text): the processor time
of its process, and of its event loop alone, and what each would carry at 90 % of a core at that price. Images are
resized in other threads of the process, which can run on other cores; the event loop is one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

import psutil

from bench import load, report
from bench.run import complain, model_folder, results_folder, save
from bench.servers import Server, free_port, interrupt_on_termination, our_command, started
from bench.stub_engine import STEP_MS

STUB = Path(__file__).parent / "stub"
FULL = 0.9  # of a core
GOALS = {"streams": ("tokens_per_s", 20_000), "images": ("requests_per_s", 400)}


def loads(replicas: int, batch: int, answers: int) -> dict[str, load.Load]:
    """Return what so many replicas are sent: as many streams as their steps take, and images of 100 KB each."""
    streams = replicas * batch
    return {
        "streams": load.Load(images=0, tokens=128, streams=streams, requests=answers * streams, warmup=streams),
        "images": load.Load(width=680, height=680, tokens=8, streams=16 * replicas, requests=240 * answers, warmup=32),
    }


def measure(target: Server, one: load.Load) -> dict[str, Any]:
    """Run a load; return its summary with the front's processor time."""
    unsampled = dataclasses.replace(target, samples=[])
    load.run(dataclasses.replace(one, requests=one.warmup, warmup=0, seed=one.seed + 1), unsampled)
    process, main = _front_seconds(target.pid)
    run = load.run(dataclasses.replace(one, warmup=0), unsampled)
    ended, main_ended = _front_seconds(target.pid)
    row = report.summary(run, [])
    return {
        **row,
        "front_cores": (ended - process) / row["seconds"],
        "loop_cores": (main_ended - main) / row["seconds"],
    }


def _front_seconds(pid: int) -> tuple[float, float]:
    """Return the processor time of the front's process, and of its main thread, which runs the event loop."""
    front = psutil.Process(pid)
    times = front.cpu_times()
    main = next(thread for thread in front.threads() if thread.id == pid)
    return times.user + times.system, main.user_time + main.system_time


def measured(folder: Path, replicas: int, arguments: argparse.Namespace, out: Path) -> dict[str, dict[str, Any]]:
    """Serve a model with that many stubs and return each workload's numbers."""
    port = free_port()
    command = our_command(folder, port, [f"max_rolling_batch_size={arguments.batch}"])
    path = [str(STUB), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "PYTHONPATH": os.pathsep.join(path),
        STEP_MS: str(arguments.step_ms),
        "SERVING_MAX_WORKERS": str(replicas),
    }
    with started("ours", command, port, out / f"{replicas}.log", environment) as target:
        chosen = loads(replicas, arguments.batch, arguments.answers)
        return {
            f"{name}, {replicas} replica{'s' * (replicas > 1)}": measure(target, one)
            for name, one in chosen.items()
            if name in arguments.workloads.split(",")
        }


def table(rows: dict[str, dict[str, Any]]) -> str:
    columns = ["", "at once", "requests/s", "tokens/s", "TTFT p50 / p99 ms", "ITL p50 / p99 ms"]
    columns += ["cores: front / event loop", "us a token", "ms a request", "at 90 % of a core", "goal"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, row in rows.items():
        rate, goal = GOALS[name.partition(",")[0]]
        ttft, itl = row["ttft_ms"], row["itl_ms"]
        used = row["front_cores"], row["loop_cores"]
        tokens, requests = max(row["tokens_per_s"], 1e-9), max(row["requests_per_s"], 1e-9)
        cells = [
            name,
            row["load"]["streams"],
            f"{requests:.0f}",
            f"{tokens:.0f}",
            f"{report.shown(ttft['p50'])} / {report.shown(ttft['p99'])}",
            f"{report.shown(itl['p50'])} / {report.shown(itl['p99'])}",
            *(
                " / ".join(format(cores * scale, digits) for cores in used)
                for scale, digits in ((1, ".2f"), (1e6 / tokens, ".0f"), (1e3 / requests, ".2f"))
            ),
            " / ".join(f"{row[rate] * FULL / max(cores, 0.01):.0f}" for cores in used) + f" {rate.partition('_')[0]}/s",
            goal,
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m bench.scale",
    )
    parser.add_argument("--model", type=Path, help="a model's folder (default: a random Llava)")
    parser.add_argument("--replicas", default="1,2,4,8", metavar="N,..", help="(%(default)s)")
    parser.add_argument("--workloads", default="streams,images", help="(%(default)s)")
    parser.add_argument("--step-ms", type=float, default=20.0, help="of the stub engine (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="requests in a step of a replica (%(default)s)")
    parser.add_argument("--answers", type=int, default=2, help="measured in each stream (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for results.json and logs")
    arguments = parser.parse_args(given)
    arguments.random = "1.5m"
    interrupt_on_termination()
    out = arguments.out or results_folder("scale")
    folder = model_folder(arguments)
    rows: dict[str, dict[str, Any]] = {}
    for count in arguments.replicas.split(","):
        rows |= measured(folder, int(count), arguments, out)
        save(out / "results.json", {"machine": report.machine(), "runs": rows})
    print(f"\n{table(rows)}\n\n{out}/results.json")
    complain(rows)


if __name__ == "__main__":
    main()
