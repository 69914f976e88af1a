"""SageMaker's control plane beside its runtime: what deploys a model as an endpoint, with our server as its container.

A client creates a model, an endpoint configuration and an endpoint by JSON 1.1, and looks until it is in service. The
container is `serve` with the model's variables and a port, in a process of its own, as SageMaker starts an image.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import httpx
import pytest

from tests.support.live import free_port
from tests.support.sagemaker_front import KEYS, REGION, SageMakerFront
from tests.support.shapes import ROOT

_SERVE = "import sys; from container.cli import serve_main; sys.exit(serve_main(sys.argv[1:]))"


class Platform(SageMakerFront):
    """Use as a context manager. `asked` is every call of the control plane: its name and what was sent."""

    def __init__(
        self, start: Callable[[Mapping[str, str]], subprocess.Popen[bytes]] | None = None, **usual: str
    ) -> None:
        """start: starts a container with these variables, in place of a process of this checkout.

        usual: variables that each container gets besides the model's own.
        """
        super().__init__("")
        self._start_container = start or _serve
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._usual = usual
        self._known: dict[str, dict[str, dict[str, Any]]] = {
            "Model": {},
            "EndpointConfig": {},
            "Endpoint": {},
        }
        self._containers: dict[str, tuple[subprocess.Popen[bytes], str]] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for name in list(self._containers):
            self._stop(name)

    def container_of(self, endpoint: str) -> str | None:
        found = self._containers.get(endpoint)
        return None if found is None else found[1]

    def control(self, call: str, sent: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return the status and the reply of one call."""
        self.asked.append((call, sent))
        verb = next((verb for verb in ("Create", "Describe", "Delete") if call.startswith(verb)), None)
        kind = call.removeprefix(verb or "")
        if verb is None or kind not in self._known:
            return 400, {"__type": "UnknownOperationException", "message": call}
        name, known = sent[f"{kind}Name"], self._known[kind]
        arn = {f"{kind}Arn": f"arn:aws:sagemaker:us-east-1:123456789012:{kind.lower()}/{name}"}
        if verb == "Create":
            known[name] = sent
            if kind == "Endpoint":
                self._start(name)
            return 200, arn
        if name not in known:
            return 400, {"__type": "ValidationException", "message": f"Could not find {name}"}
        if verb == "Describe":
            status = {"EndpointStatus": self._status(name)} if kind == "Endpoint" else {}
            return 200, {**known[name], **arn, **status, "CreationTime": 0, "LastModifiedTime": 0}
        del known[name]
        if kind == "Endpoint":
            self._stop(name)
        return 200, {}

    def _start(self, endpoint: str) -> None:
        config = self._known["EndpointConfig"][self._known["Endpoint"][endpoint]["EndpointConfigName"]]
        (variant,) = config["ProductionVariants"]
        model = self._known["Model"][variant["ModelName"]]
        container = model.get("PrimaryContainer") or model["Containers"][0]
        port = str(free_port())
        process = self._start_container(
            {
                "SAGEMAKER_BIND_TO_PORT": port,
                "SERVING_HOST": "127.0.0.1",
                **self._usual,
                **container["Environment"],
            }
        )
        self._containers[endpoint] = process, f"http://127.0.0.1:{port}"

    def _status(self, endpoint: str) -> str:
        process, url = self._containers[endpoint]
        if process.poll() is not None:
            return "Failed"
        try:
            return "InService" if httpx.get(f"{url}/ping", timeout=2).status_code == 200 else "Creating"
        except httpx.HTTPError:
            return "Creating"

    def _stop(self, endpoint: str) -> None:
        process, _ = self._containers.pop(endpoint)
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _serve(environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    here = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-c", _SERVE],
        env={**here, "PYTHONPATH": str(ROOT), **environ},
        stdout=subprocess.DEVNULL,
    )


def sdk() -> str:
    """Return the directory of SageMaker's SDK 2. `make clients` installs it aside, as its pins clash with ours."""
    path = ROOT / ".venv-clients" / "sagemaker"
    if not (path / "installed").is_file():
        pytest.skip("SageMaker's SDK is not installed (make clients)")
    return str(path)


def environment(platform: SageMakerFront) -> dict[str, str]:
    """Return the variables with which AWS's clients find the stand-in, and nothing else."""
    return {
        "AWS_ENDPOINT_URL": platform.url,
        "AWS_ACCESS_KEY_ID": str(KEYS.access_key),
        "AWS_SECRET_ACCESS_KEY": str(KEYS.secret_key),
        "AWS_DEFAULT_REGION": REGION,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "SAGEMAKER_SUPPRESS_V2_WARNING": "1",
    }
