"""Measure our server under load, started here. `lmi bench` measures any that is up.

python -m bench.run --streams 1,4,16,32
python -m bench.run --model examples/shapes --option max_rolling_batch_size=64
python -m bench.run --rate 2,4,8 --size 1024x1024
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import load, models, page, plots, report, servers, sweep
from bench.live import View

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m bench.run"
    )
    add_model_arguments(parser)
    load.add_arguments(parser, streams="1,4,16,32")
    arguments = parser.parse_args()
    out = results_folder("run")
    with server(arguments, out) as target, View() as view:
        runs: list[load.Run] = []
        results = sweep.sweep([target], load.from_arguments(arguments), view, runs)
        if not runs:
            raise SystemExit("interrupted before the first load was complete")
        line = report.timeline(runs[-1], target.samples)
    save(out / "results.json", results)
    (out / "report.html").write_text(page.html(results))
    plots.timelines(out / "timeline.png", {str(runs[-1].load): line})
    rows = {level["name"]: level["servers"][0] for level in results["levels"]}
    print(f"\n{report.table(rows)}\n\n{out}/results.json, report.html, timeline.png")
    complain(rows)


@contextlib.contextmanager
def server(arguments: argparse.Namespace, out: Path) -> Iterator[servers.Server]:
    """Yield our server with the model and the options that the arguments name."""
    servers.interrupt_on_termination()
    port = servers.free_port()
    command = servers.our_command(model_folder(arguments), port, arguments.option, arguments.python)
    with servers.started("ours", command, port, out / "ours.log") as target:
        yield target


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model our server serves, and how."""
    parser.add_argument("--model", type=Path, help="a model's folder (default: a random Llava of --random)")
    parser.add_argument("--random", choices=models.SIZES, default="1.5m", help="parameters (%(default)s)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="for our server; may be repeated"
    )
    parser.add_argument("--python", type=Path, help="of the environment that our server runs in (default: this one)")


def model_folder(arguments: argparse.Namespace) -> Path:
    """Return the model's folder, written first if it is the random one."""
    if arguments.model:
        return Path(arguments.model)
    return models.write(RESULTS / "models" / arguments.random, arguments.random)


def results_folder(kind: str) -> Path:
    out = RESULTS / time.strftime(f"{kind}-%Y%m%d-%H%M%S")
    out.mkdir(parents=True, exist_ok=True)
    return out


def save(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def complain(rows: dict[str, dict[str, Any]]) -> None:
    """Exit with the reasons if any request failed."""
    for name, row in rows.items():
        if report.failed(row):
            raise SystemExit(f"{name}: {report.failed(row)} failed, {row['outcomes']}: {row['errors']}")


if __name__ == "__main__":
    main()
