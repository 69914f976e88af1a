"""vLLM on two machines through Ray: two namespaces of this machine, each with a Ray node of one device.

Needs `ray` beside vLLM (`pip install ray`), the right to make network namespaces, and vLLM's CPU build.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from container.check import run_check
from engine.machine import this_machine
from handlers.backends.vllm import devices
from handlers.backends.vllm.devices import Cluster, running_cluster
from handlers.errors import InvalidConfiguration
from tests.support.backend import BACK
from tests.support.live import LiveServer
from tests.support.models import make_llava
from tests.vllm_live import ray_on_cpu
from tests.vllm_live.machines import LINK, Machines, until

RAY = ("rolling_batch=vllm", "distributed_executor_backend=ray")


def why_not() -> str | None:
    if find_spec("ray") is None:
        return "ray is not installed"
    if this_machine().accelerators:
        return "the cluster of this test pretends that it has devices"
    try:
        with Machines():
            return None
    except (OSError, subprocess.CalledProcessError):
        return "this process may not make network namespaces"


class RayNode:
    """`ray start` on one machine; the first is the head."""

    def __init__(self, machines: Machines, number: int, environ: dict[str, str], directory: str) -> None:
        address = machines.addresses[number]
        role = ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={directory}"]
        if number:
            role = [f"--address={machines.addresses[0]}:6379"]
        with machines.on(number):
            self.process = subprocess.Popen(
                [
                    sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--block", *role,
                    f"--node-ip-address={address}", "--num-cpus=1", "--num-gpus=1", "--object-store-memory=100000000",
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, **environ, "RAY_USAGE_STATS_ENABLED": "0"},
            )  # fmt: skip
        assert self.process.stdout is not None
        log = ""
        for line in self.process.stdout:
            log += line
            if "Ray runtime started" in line:
                return
        raise AssertionError(f"Ray did not start:\n{log}")

    def end(self) -> None:
        """As if its plug had been pulled."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for child in family:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.wait()
        psutil.wait_procs(family, timeout=10)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Pair:
    """Two machines with a Ray node each."""

    def __init__(self, machines: Machines, directory: str) -> None:
        self.machines = machines
        self._directory = directory
        self.environ = {
            "PYTHONPATH": os.pathsep.join((ray_on_cpu.install(Path(directory, "plugin")), os.getcwd())),
            "RAY_ADDRESS": f"{machines.addresses[0]}:6379",
            "GLOO_SOCKET_IFNAME": LINK,
            # There is nobody to ask for names here.
            "RES_OPTIONS": "timeout:1 attempts:1",
        }
        self.nodes: dict[int, RayNode] = {}

    def start(self, number: int) -> None:
        environ = {name: value for name, value in self.environ.items() if name != "RAY_ADDRESS"}
        self.nodes[number] = RayNode(self.machines, number, environ, self._directory)

    def stop(self, number: int) -> None:
        self.nodes.pop(number).end()

    def workers(self) -> dict[int, list[psutil.Process]]:
        """The processes that hold a part of the model, by machine."""
        found: dict[int, list[psutil.Process]] = {0: [], 1: []}
        for node in self.nodes.values():
            for child in psutil.Process(node.process.pid).children(recursive=True):
                if child.is_running() and any("RayWorkerProc" in part for part in child.cmdline()):
                    found[self.machines.of(child.pid)].append(child)
        return found


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with ExitStack() as stack:
        # Short, since it becomes part of the names of sockets.
        directory = tempfile.mkdtemp(prefix="ray")
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        pair = Pair(stack.enter_context(Machines()), directory)
        stack.callback(lambda: [pair.stop(number) for number in (1, 0) if number in pair.nodes])
        pair.start(0)
        pair.start(1)
        yield pair


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def asked_anew() -> Iterator[None]:
    devices._asked.cache_clear()
    yield
    devices._asked.cache_clear()


@pytest.mark.machines
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("asked_anew")
def test_the_devices_of_all_machines_are_counted(
    pair: Pair, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in pair.environ.items():
        monkeypatch.setenv(name, value)
    with pair.machines.on(0):
        assert running_cluster() == Cluster(devices=2, machines=2)
        assert run_check(str(model), RAY, False, {}) == 0
        assert "devices needed: 2, there: 2 on 2 machines" in capsys.readouterr().out
        assert run_check(str(model), [*RAY, "tensor_parallel_degree=2", "pipeline_parallel_degree=2"], False, {}) == 0
        told = capsys.readouterr().out
        assert "devices needed: 4, there: 2 on 2 machines" in told
        assert re.search("needs 4 devices, but the Ray cluster has 2 on 2 machines: the start waits for more", told)


@pytest.mark.machines
@pytest.mark.timeout(900)
def test_a_model_is_served_across_machines_and_survives_the_loss_of_one(pair: Pair, model: Path) -> None:
    with pair.machines.on(0), LiveServer(model, *RAY, "dtype=float32", **pair.environ) as server:
        assert "1 x 1 x 2 devices" in server.log, "`max` is all devices of the cluster"
        workers = pair.workers()
        assert [len(workers[number]) for number in (0, 1)] == [1, 1]
        want = answer(server)

        workers[1][0].kill()
        until(lambda: server.http.get("/ping").status_code == 503, 30)
        reply = server.chat("hello")
        assert reply.status_code == 503
        assert "Traceback" not in reply.text
        server.wait_for(BACK)
        assert answer(server) == want

        pair.stop(1)
        until(lambda: server.http.get("/ping").status_code == 503, 60)
        pair.start(1)
        server.wait_for(BACK)
        assert answer(server) == want
        assert server.metrics()["lmi_engine_restarts_total"] == 2
    until(lambda: not any(pair.workers().values()), 30)


@pytest.mark.usefixtures("asked_anew")
def test_without_ray_it_is_said_what_to_install(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert run_check(str(model), RAY, False, {}) == 1
    assert "ray is not installed: install ray>=2.40 beside vLLM (pip install 'ray>=2.40')" in (capsys.readouterr().out)


@pytest.mark.usefixtures("asked_anew")
def test_a_cluster_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("ray") is None:
        pytest.skip("ray is not installed")
    with taken_port() as port:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        monkeypatch.setattr(devices, "ASK_SECONDS", 5.0)
        with pytest.raises(InvalidConfiguration, match=rf"RAY_ADDRESS = '127.0.0.1:{port}'"):
            running_cluster()


def answer(server: LiveServer) -> str:
    reply = server.chat("hello", max_tokens=16, ignore_eos=True)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


@contextmanager
def taken_port() -> Iterator[int]:
    """One where nobody speaks."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
