"""The command line: `lmi serve`, `run`, `check` and `bench`, and `serve` as SageMaker starts a container."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from container.flags import FlagError, Flags, read_flags
from handlers.version import VERSION

if TYPE_CHECKING:
    from container.server import BackendBuilder
    from handlers.backends.instances import Instance

_OWN = ("-h", "--help", "--json", "--all", "--instance", "--print-config")
_FLAGS_HELP = (
    "Every option can be written as a flag of its own: --max-model-len 4096, --limit-mm-per-prompt image=2, "
    "--chat-template template.jinja, --trust-remote-code, --host 0.0.0.0, --port 8000, --api-key KEY. Give keys by "
    "SERVING_API_KEY or serving.properties instead: others see this command line. docs/configuration.md has them all."
)


def main(
    argv: Sequence[str] | None = None, build: BackendBuilder | None = None, defaults: Mapping[str, str] | None = None
) -> int:
    """Run the `lmi` command and return its exit status.

    build: makes the backend; None for what the options select. defaults: values of options that no source sets; None
    for the command's own.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["bench"]:
        return _bench(given[1:])
    parser = _parser()
    parser.add_argument("--version", action="version", version=f"lmi-handler {VERSION}")
    if not given or given[0] not in ("serve", "run", "check"):
        parser.parse_args(given or ["--help"])
    flags = _flags(parser, given[1:])
    arguments = parser.parse_args([given[0], *flags.rest])
    options = [*arguments.option, *flags.options, *flags.secret]
    if arguments.command == "check":
        from container.check import run_check

        for warning in flags.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return run_check(
            arguments.model, options, arguments.json, os.environ, everything=arguments.all, instances=arguments.instance
        )
    from container.config import RUN_DEFAULTS, SERVE_DEFAULTS

    if defaults is None:
        defaults = RUN_DEFAULTS if arguments.command == "run" else SERVE_DEFAULTS
    if arguments.print_config:
        return _print_config(arguments.model, options, defaults)
    return _serve(arguments.model, options, defaults, flags.warnings, build)


def serve_main(argv: Sequence[str] | None = None, build: BackendBuilder | None = None) -> int:
    """Run the `serve` command: `lmi serve` on all addresses, as a container needs it."""
    return main(["serve", *(sys.argv[1:] if argv is None else argv)], build, defaults={})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lmi", description="Serve a vision-language model.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a model over HTTP, on port 8080", epilog=_FLAGS_HELP)
    run = commands.add_parser(
        "run", help="serve a model as Aphrodite's users start it, on port 2242", epilog=_FLAGS_HELP
    )
    check = commands.add_parser(
        "check", help="show what would be served and how, without loading the model", epilog=_FLAGS_HELP
    )
    commands.add_parser("bench", help="measure servers that are up, and write a page about them")
    for command in (serve, run, check):
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
    for command in (serve, run):
        command.add_argument(
            "--print-config",
            action="store_true",
            help="print the serving.properties that reproduces this run, without secrets, and serve nothing",
        )
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument("--all", action="store_true", help="print the options that have their defaults too")
    check.add_argument(
        "--instance",
        type=_instances,
        default=(),
        metavar="NAME",
        help="measure against that EC2 or SageMaker instance instead of this machine, as ml.g6.12xlarge; all: a "
        "table that says which of them it fits",
    )
    return parser


def _bench(arguments: list[str]) -> int:
    try:
        from bench.sweep import main as bench
    except ModuleNotFoundError as error:
        print(f"lmi bench needs {str(error.name).partition('.')[0]}: pip install 'lmi-handler[bench]'", file=sys.stderr)
        return 1
    return bench(arguments)


def _instances(name: str) -> list[Instance]:
    from handlers.backends.instances import INSTANCES, instance_of

    if name == "all":
        return list(INSTANCES.values())
    try:
        return [instance_of(name)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _flags(parser: argparse.ArgumentParser, arguments: list[str]) -> Flags:
    from handlers.backends.vllm.compat import engine_argument_names

    try:
        flags = read_flags(arguments, _OWN, engine_argument_names())
    except FlagError as error:
        parser.error(str(error))
    if flags.secret:
        flags.warnings.append(
            "secrets on the command line can be read by every user of this machine: give api_key and hf_token by "
            "SERVING_API_KEY and HF_TOKEN, or in serving.properties"
        )
    return flags


def _print_config(model: str | None, options: Sequence[str], defaults: Mapping[str, str]) -> int:
    from container.config import as_properties, configured
    from properties.problem import ConfigurationError

    try:
        sys.stdout.write(as_properties(configured(model, options, os.environ, defaults)))
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _serve(
    model: str | None,
    options: Sequence[str],
    defaults: Mapping[str, str],
    warnings: Sequence[str],
    build: BackendBuilder | None,
) -> int:
    """Serve with the options of a command line. defaults: the values of options that no source sets."""
    # A signal without a handler does not end process 1 of a container.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os._exit(0))
    from container.server import start

    status = start(model, options, os.environ, defaults, warnings, build)
    sys.stdout.flush()
    sys.stderr.flush()
    threads = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    if "torch" in sys.modules or not all(thread.daemon for thread in threads):
        os._exit(status)  # Nothing is left to do, but unloading torch takes seconds and a download may hang.
    return status


if __name__ == "__main__":
    sys.exit(main())
