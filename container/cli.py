"""The command line: `lmi serve`, `lmi check`, and `serve` as SageMaker starts a container."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from container.server import BackendBuilder

LOOPBACK = "127.0.0.1"


def main(argv: Sequence[str] | None = None, build: BackendBuilder | None = None) -> int:
    """The `lmi` command; the exit status. build: makes the backend; None is the one that the options choose."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "check":
        from container.check import run_check

        return run_check(arguments.model, arguments.option, arguments.json, os.environ)
    return _serve(arguments, build, reachable=False)


def serve_main(argv: Sequence[str] | None = None, build: BackendBuilder | None = None) -> int:
    """The `serve` command: `lmi serve`, but on all addresses, as a container must be."""
    given = list(sys.argv[1:] if argv is None else argv)
    return _serve(_parser().parse_args(["serve", *given]), build, reachable=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lmi", description="Serve a vision-language model.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a model over HTTP")
    check = commands.add_parser("check", help="show what would be served and how, without loading the model")
    for command in (serve, check):
        command.add_argument(
            "model",
            nargs="?",
            metavar="MODEL",
            help="a directory, a Hugging Face hub id or s3://bucket/prefix/; default: what the environment "
            "or /opt/ml/model says",
        )
        command.add_argument(
            "--option",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="set an option, as in serving.properties; may be repeated and wins over other sources",
        )
    serve.add_argument(
        "--host", help=f"address to listen on; default {LOOPBACK}, for the serve command 0.0.0.0"
    )
    serve.add_argument("--port", type=int, help="port to listen on; default 8080; 0 for any free one")
    check.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _serve(arguments: argparse.Namespace, build: BackendBuilder | None, *, reachable: bool) -> int:
    """reachable: listen on all addresses unless told otherwise."""
    # As process 1 of a container we would not even be killed by a signal that nobody handles.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os._exit(0))
    from container.start import start

    options = list(arguments.option)
    if arguments.host is not None:
        options.append(f"host={arguments.host}")
    if arguments.port is not None:
        options.append(f"port={arguments.port}")
    status = start(arguments.model, options, os.environ, None if reachable else LOOPBACK, build)
    sys.stdout.flush()
    sys.stderr.flush()
    threads = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    if "torch" in sys.modules or not all(thread.daemon for thread in threads):
        os._exit(status)  # Nothing is left to do; tearing torch down takes seconds, a transfer may hang.
    return status


if __name__ == "__main__":
    sys.exit(main())
