"""vLLM on two machines through its own launcher: `lmi serve` on each, the same options but for option.node_rank."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from engine.machine import this_machine
from tests.support.backend import BACK
from tests.support.live import LiveServer
from tests.support.models import make_llava
from tests.vllm_live.machines import LINK, Machines, until


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    if this_machine().accelerators:
        pytest.skip("the two machines of this test are one, and vLLM would give both the same devices")
    machines = Machines()
    with ExitStack() as stack:
        try:
            stack.enter_context(machines)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this process may not make network namespaces")
        yield machines


@contextmanager
def started(machines: Machines, model: Path, rank: int) -> Iterator[LiveServer]:
    options = [
        "rolling_batch=vllm", "dtype=float32", "tensor_parallel_degree=2", "nnodes=2", f"node_rank={rank}",
        f"master_addr={machines.addresses[0]}", "master_port=29501",
    ]  # fmt: skip
    environ = {
        "VLLM_HOST_IP": machines.addresses[rank],
        "GLOO_SOCKET_IFNAME": LINK,
        # There is nobody to ask for names here.
        "RES_OPTIONS": "timeout:1 attempts:1",
    }
    with machines.on(rank):
        server = LiveServer(model, *options, ready=False, **environ)
    with server:
        yield server


@pytest.mark.machines
@pytest.mark.timeout(900)
def test_two_machines_serve_one_model_and_recover_from_the_loss_of_a_part(
    machines: Machines, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = make_llava(tmp_path_factory.mktemp("models") / "tiny")
    with started(machines, model, 0) as first, started(machines, model, 1) as second:
        first.wait_for("ready after")
        second.wait_for("ready after")
        with machines.on(0):
            want = answer(first)
        with machines.on(1):
            assert second.http.get("/ping").status_code == 200
            refused = second.chat("hello")
            assert refused.status_code == 503
            assert "requests are answered by the first one" in refused.text
        children = psutil.Process(second.process.pid).children(recursive=True)
        (part,) = [child for child in children if "VLLM::Worker" in " ".join(child.cmdline())]
        assert machines.of(part.pid) == 1

        part.kill()
        with machines.on(0):
            until(lambda: first.http.get("/ping").status_code == 503, 60)
        first.wait_for(BACK)
        second.wait_for("this machine's part of the engine is back")
        with machines.on(0):
            assert answer(first) == want
        family = [*children, *psutil.Process(second.process.pid).children(recursive=True)]
        with machines.on(1):
            second.process.kill()
        assert not [left for left in psutil.wait_procs(family, timeout=30)[1] if left.status() != "zombie"], (
            "a killed server leaves no workers behind"
        )


def answer(server: LiveServer) -> str:
    reply = server.chat("hello", max_tokens=16, ignore_eos=True)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])
