"""Measure our server and engine beside OpenVINO GenAI's continuous batching: the same requests, in turns, in one run.

    python -m bench.openvino                                    a random Llava of 212 million parameters
    python -m bench.openvino --model FOLDER --sides ours,openvino

OpenVINO runs in the environment of --peer-python, in a process of its own without a server; the model is converted
first, where it is not yet. docs/performance.md says how to install it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import load, report, servers
from bench.client import Reply
from bench.compare import medians_of
from bench.in_process import Answered, Asked
from bench.run import RESULTS, add_model_arguments, complain, model_folder, results_folder, save

SCRIPT = Path(__file__).parent / "in_process.py"
INT8 = "quantize=int8"

Measure = Callable[[load.Load], dict[str, Any]]


@dataclass(frozen=True)
class Side:
    """One of what is compared.

    Attributes:
        about: For a reader of the table.
        peer: The side that it is compared with.
        weights: What OpenVINO's weights are stored in; "" for our sides.
        served: Whether requests come over HTTP.
        options: Of ours.
    """

    about: str
    peer: str = ""
    weights: str = ""
    served: bool = False
    options: tuple[str, ...] = ()


SIDES = {
    "ours": Side("our server, over HTTP", "openvino", served=True),
    "ours-engine": Side("our engine, in process", "openvino"),
    "openvino": Side("OpenVINO GenAI, in process", weights="fp16"),
    "ours-int8": Side(f"our server, {INT8}", "openvino-int8", served=True, options=(INT8,)),
    "openvino-int8": Side("OpenVINO GenAI, int8 weights", weights="int8"),
}
LOADS = (load.Load(requests=4, streams=1, warmup=1), load.Load(requests=32, streams=16, warmup=16))


def main() -> None:
    arguments = _parser().parse_args()
    servers.interrupt_on_termination()
    out = results_folder("openvino")
    rounds: dict[str, list[dict[str, dict[str, Any]]]] = {str(one): [] for one in LOADS}
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(_started(name, arguments, out)) for name in arguments.sides}
        for turn in range(arguments.rounds):
            for one in LOADS:
                rows = _round(sides, dataclasses.replace(one, seed=one.seed + 1000 * turn), turn)
                rounds[str(one)].append(rows)
    medians = {name: {side: medians_of([r[side] for r in of]) for side in of[0]} for name, of in rounds.items()}
    ratios = {name: times_better(of) for name, of in rounds.items()}
    content = {"machine": report.machine(), "medians": medians, "ratios": ratios, "rounds": rounds}
    save(out / "results.json", content)
    text = markdown(medians, ratios)
    (out / "results.md").write_text(text)
    print(f"\n{text}\n{out}/results.json, results.md")
    complain({f"{name}, {side}": row for name, of in medians.items() for side, row in of.items()})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m bench.openvino",
    )
    add_model_arguments(parser)
    parser.set_defaults(random="212m")
    parser.add_argument("--peer-python", type=Path, default=Path(".venv-openvino/bin/python"), help="(%(default)s)")
    parser.add_argument("--peer-option", action="append", default=[], metavar="KEY=VALUE", help="for OpenVINO")
    parser.add_argument(
        "--converted",
        type=Path,
        default=RESULTS / "models" / "openvino",
        help="a folder for converted models (%(default)s)",
    )
    parser.add_argument("--sides", type=_sides, default=[*SIDES], help=f"of {','.join(SIDES)} (all)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    return parser


def _sides(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - SIDES.keys():
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: expected some of {','.join(SIDES)}")
    return names


@contextlib.contextmanager
def _started(name: str, arguments: argparse.Namespace, out: Path) -> Iterator[Measure]:
    """Yield the function that sends a load to a side and sums up the answers."""
    side, folder, log = SIDES[name], model_folder(arguments), out / f"{name}.log"
    options = [*arguments.option, *side.options]
    if side.served:
        port = servers.free_port()
        command = servers.our_command(folder, port, options, arguments.python)
        with servers.started(name, command, port, log) as server:
            yield functools.partial(_serve, server)
        return
    python, kind = arguments.python or Path(sys.executable), "ours"
    if side.weights:
        python, kind, options = arguments.peer_python, "openvino", arguments.peer_option
        folder = convert(python, folder, arguments.converted, side.weights, log)
    with worker([str(python), "-P", str(SCRIPT), kind, str(folder), *options], log) as process:
        computes_in = json.loads(_line(process, log))["computes_in"]
        yield functools.partial(_pass_on, process, log, computes_in)


def convert(python: Path, folder: Path, where: Path, weights: str, log: Path) -> Path:
    """Return the folder of a model in OpenVINO's format, converted first unless it is there."""
    if not python.exists():
        raise SystemExit(f"{python} is not there: docs/performance.md says how to install OpenVINO GenAI")
    made = where / f"{folder.resolve().name}-{weights}"
    if made.exists():
        return made
    partial = made.with_suffix(f".{os.getpid()}")
    command = [str(python.parent / "optimum-cli"), "export", "openvino", "--model", str(folder)]
    command += ["--task", "image-text-to-text", "--weight-format", weights, str(partial)]
    with log.open("wb") as output:
        done = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    if done.returncode:
        raise SystemExit(f"the model could not be converted: {log}")
    partial.rename(made)
    return made


@contextlib.contextmanager
def worker(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a process that is asked in lines; it ends with its input, so even if this process is killed."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True)
    assert process.stdin is not None
    try:
        yield process
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _line(process: subprocess.Popen[str], log: Path) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a process ended too early: {log}")
    return line


def _serve(server: servers.Server, one: load.Load) -> dict[str, Any]:
    row = report.summary(load.run(one, server), server.samples)
    return {**row, "memory_mb": row["front_mb"] + row["workers_mb"], "computes_in": ""}


def _pass_on(process: subprocess.Popen[str], log: Path, computes_in: str, one: load.Load) -> dict[str, Any]:
    assert process.stdin is not None
    bodies = [body.decode() for body in load.bodies(one, "")]
    asked = Asked(bodies=bodies, streams=one.streams, warmup=one.warmup)
    process.stdin.write(json.dumps(asked) + "\n")
    process.stdin.flush()
    return summary(one, json.loads(_line(process, log)), computes_in)


def summary(one: load.Load, answered: Answered, computes_in: str) -> dict[str, Any]:
    """Return what `report.summary` does, of answers that came without a server."""
    replies = [
        Reply(
            reply["start"],
            200,
            reply["tokens"],
            reply["tokens"][-1],
            reply["prompt_tokens"],
            len(reply["tokens"]),
        )
        for reply in answered["replies"]
    ]
    row = report.summary(load.Run(one, replies, answered["begin"], answered["end"], 0.0), [])
    cores = answered["cpu"] / row["seconds"]
    memory = answered["memory"] / servers.MB
    return {**row, "cpu_cores": cores, "memory_mb": memory, "computes_in": computes_in}


def _round(sides: Mapping[str, Measure], one: load.Load, turn: int) -> dict[str, dict[str, Any]]:
    names = [*sides]
    first = turn % len(names)
    rows = {}
    for name in names[first:] + names[:first]:
        rows[name] = sides[name](one)
        row = rows[name]
        print(
            f"{time.strftime('%X')} {one.arrival}, {name}: {row['tokens_per_s']:.0f} tokens/s, "
            f"{report.shown(row['tpot_ms']['p50'], 1)} ms per token",
            file=sys.stderr,
        )
    return {name: rows[name] for name in names}


def times_better(rounds: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Return for each of our sides how many times better than its peer it is, medians of each round's ratios."""
    return {
        name: report.times_better([(rows[name], rows[side.peer]) for rows in rounds])
        for name, side in SIDES.items()
        if side.peer and {name, side.peer} <= rounds[0].keys()
    }


def markdown(
    medians: Mapping[str, Mapping[str, dict[str, Any]]],
    ratios: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> str:
    """Return the tables of a run. Each "times" is the ratio of the column before it to that of the side's peer."""
    columns = ["", "tokens/s", "times", "ms per token", "times", "TTFT p50 / p99 ms", "times (p50)"]
    columns += ["ITL p50 / p99 ms", "cores", "tokens per CPU second", "MB"]
    lines = []
    for name, of in medians.items():
        lines += [f"## {name}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for side, row in of.items():
            lines.append(f"| {SIDES[side].about} | {' | '.join(_cells(row, ratios[name].get(side, {})))} |")
        lines.append("")
    lines += [
        f"- {SIDES[side].about}: {row['computes_in']}; {row['prompt_tokens']:.0f} prompt tokens"
        for side, row in next(iter(medians.values())).items()
        if row["computes_in"]
    ]
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any], better: Mapping[str, float]) -> list[str]:
    def times(key: str) -> str:
        return f"{better[key]:.2f}" if better else ""

    def two(key: str) -> str:
        return f"{report.shown(row[key]['p50'])} / {report.shown(row[key]['p99'])}"

    return [
        f"{row['tokens_per_s']:.0f}",
        times("tokens_per_s"),
        report.shown(row["tpot_ms"]["p50"], 1),
        times("tpot_ms p50"),
        two("ttft_ms"),
        times("ttft_ms p50"),
        two("itl_ms"),
        f"{row['cpu_cores']:.2f}",
        f"{row['tokens_per_s'] / row['cpu_cores']:.0f}",
        f"{row['memory_mb']:.0f}",
    ]


if __name__ == "__main__":
    main()
