"""Measure our server and another side by side: the same requests, in turns, in one run.

    python -m bench.compare                                     against vLLM in .venv-vllm
    python -m bench.compare --loads custom --streams 1,8,32     latency against load, both servers
    python -m bench.compare --peer-url http://10.0.0.7:8000     against a server that is up
    python -m bench.compare --peer ours --peer-option KEY=VALUE two settings of ours

Both servers stay up all the while, and each round sends both the same new requests, the order changing with
every round; what the idle one costs the other is measured too, as the "idle" column of processor time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import load, page, plots, report, servers, sweep
from bench.live import View
from bench.run import add_model_arguments, complain, model_folder, results_folder, save


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m bench.compare",
    )
    add_model_arguments(parser)
    parser.add_argument("--peer", choices=("vllm", "ours"), default="vllm", help="(%(default)s)")
    parser.add_argument("--peer-url", help="a server that is already up, http://host:port")
    parser.add_argument("--peer-python", type=Path, default=Path(".venv-vllm/bin/python"), help="(%(default)s)")
    parser.add_argument("--peer-option", action="append", default=[], metavar="KEY=VALUE", help="--peer ours")
    parser.add_argument("--peer-argument", action="append", default=[], help="for vLLM's own command line")
    parser.add_argument(
        "--server-cores",
        type=_numbers,
        default=(),
        metavar="N,..",
        help="the cores of both servers; the load generator takes the others (default: all share all)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    names = ",".join(load.LOADS)
    parser.add_argument("--loads", default=names, help=f"of {names},custom; custom: as below (%(default)s)")
    load.add_arguments(parser, streams="32")
    arguments = parser.parse_args()
    if arguments.python is None and arguments.peer == "vllm" and not arguments.peer_url:
        # The same torch, transformers and torchvision for both.
        arguments.python = arguments.peer_python

    out = results_folder("compare")
    rounds: dict[str, list[dict[str, dict[str, Any]]]] = {}
    lines: dict[str, dict[str, Any]] = {}
    with both(arguments, out) as pair, View() as view:
        for name, one in _loads(arguments).items():
            rounds[name] = []
            for turn in range(arguments.rounds):
                runs = _round(pair, dataclasses.replace(one, seed=one.seed + 1000 * turn), turn, view)
                rounds[name].append({k: report.summary(run, pair[k].samples) for k, run in runs.items()})
                _add_idle(rounds[name][-1], runs, pair)
                lines = {f"{k}: {one}": report.timeline(run, pair[k].samples) for k, run in runs.items()}

    medians = {name: {k: medians_of([r[k] for r in of]) for k in of[0]} for name, of in rounds.items()}
    ours, peer = pair
    ratios = {name: report.times_better([(r[ours], r[peer]) for r in of]) for name, of in rounds.items()}
    save(
        out / "results.json",
        {"machine": report.machine(), "medians": medians, "ratios": ratios, "rounds": rounds},
    )
    levels = [sweep.level(name, [*of.values()]) for name, of in medians.items()]
    (out / "report.html").write_text(page.html(sweep.results([*pair.values()], "medians of rounds", levels)))
    plots.timelines(out / "timeline.png", lines)
    text = _markdown(medians, ratios, peer)
    (out / "results.md").write_text(text)
    print(f"\n{text}\n{out}/results.json, results.md, report.html, timeline.png")
    complain({f"{name}, {k}": row for name, of in medians.items() for k, row in of.items()})


@contextlib.contextmanager
def both(arguments: argparse.Namespace, out: Path) -> Iterator[dict[str, servers.Server]]:
    """Yield our server and the peer by name, started here unless the peer is already up."""
    servers.interrupt_on_termination()
    folder = model_folder(arguments)
    started = functools.partial(servers.started, cores=arguments.server_cores)
    servers.leave_cores(arguments.server_cores)
    with contextlib.ExitStack() as stack:
        if arguments.peer_url:
            peer = servers.running(arguments.peer_url)
        else:
            port = servers.free_port()
            if arguments.peer == "vllm":
                command = servers.vllm_command(arguments.peer_python, folder, port, arguments.peer_argument)
                extra = servers.VLLM_ENVIRONMENT
            else:
                command, extra = (
                    servers.our_command(folder, port, arguments.peer_option, arguments.python),
                    {},
                )
            name = "vLLM" if arguments.peer == "vllm" else "ours, other options"
            peer = stack.enter_context(started(name, command, port, out / "peer.log", extra))
        port = servers.free_port()
        command = servers.our_command(folder, port, arguments.option, arguments.python)
        same = servers.VLLM_ENVIRONMENT if arguments.peer == "vllm" else {}
        ours = stack.enter_context(started("ours", command, port, out / "ours.log", same))
        yield {ours.name: ours, peer.name: peer}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _loads(arguments: argparse.Namespace) -> dict[str, load.Load]:
    chosen: dict[str, load.Load] = {}
    for name in arguments.loads.split(","):
        if name == "custom":
            chosen.update({str(one): one for one in load.from_arguments(arguments)})
        elif name in load.LOADS:
            chosen[name] = load.LOADS[name]
        else:
            raise SystemExit(f"--loads {name}: expected one of {', '.join(load.LOADS)}, custom")
    return chosen


def _round(pair: dict[str, servers.Server], one: load.Load, turn: int, view: View) -> dict[str, load.Run]:
    runs = {}
    for target in [*pair.values()] if turn % 2 == 0 else [*pair.values()][::-1]:
        runs[target.name] = load.run(one, target, view.watch)
        view.add(target, one, report.summary(runs[target.name], target.samples))
    return {name: runs[name] for name in pair}


def _add_idle(row: dict[str, dict[str, Any]], runs: dict[str, load.Run], pair: dict[str, servers.Server]) -> None:
    (ours, peer) = pair
    for name, other in ((ours, peer), (peer, ours)):
        row[name]["idle_cores"] = report.cores(runs[other], pair[name].samples)


def medians_of(rows: list[Any]) -> Any:
    """Return what each of the rounds returned, with the median in place of each number that any of them has."""
    rows = [row for row in rows if row is not None]
    first = rows[0] if rows else None
    if isinstance(first, dict):
        return {key: medians_of([row[key] for row in rows if key in row]) for key in first}
    if isinstance(first, float):
        return statistics.median(rows)
    return first


def _markdown(medians: dict[str, dict[str, Any]], ratios: dict[str, dict[str, float]], peer: str) -> str:
    sections = []
    for name, of in medians.items():
        better = ", ".join(f"{key} {value:.2f}" for key, value in ratios[name].items())
        idle = ", ".join(f"{k} {row['idle_cores']:.2f}" for k, row in of.items())
        client = ", ".join(f"beside {k} {row['client_cores']:.2f}" for k, row in of.items())
        sections.append(
            f"## {name}\n\n{report.table(of)}\n\n"
            f"Times better than {peer} (above 1 is better): {better}\n\n"
            f"Cores used while idle: {idle}; by the load generator: {client}\n"
        )
    return "\n".join(sections)


if __name__ == "__main__":
    main()
