"""The devices of the Ray cluster that vLLM will use, counted by a short-lived process.

A process of its own, since a Ray driver that does not reach its cluster tries for minutes and cannot be interrupted,
and since nothing of Ray shall stay in this one. No cluster is started.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from handlers.errors import InvalidConfiguration
from processes.environment import child_command, child_environment
from processes.inside import die_with_parent

logger = logging.getLogger(__name__)

ASK_SECONDS = 30.0
"""Until a cluster has answered, the import of Ray included."""

INSTALL = "install ray>=2.40 beside vLLM (pip install 'ray>=2.40')"


@dataclass(frozen=True)
class Cluster:
    """devices: of all machines that are up. machines: how many they are."""

    devices: int
    machines: int


def running_cluster() -> Cluster | None:
    """The one that RAY_ADDRESS names, or the one of this machine; None where none runs, so that vLLM would start one.

    Blocks for seconds, the first time. Raises InvalidConfiguration without ray, and when the cluster does not answer.
    """
    if find_spec("ray") is None:
        raise InvalidConfiguration(f"ray is not installed: {INSTALL}")
    return _asked(os.environ.get("RAY_ADDRESS", ""))


@cache
def _asked(address: str) -> Cluster | None:
    if address == "local":  # Ray's word for: start one.
        return None
    named = f"RAY_ADDRESS = {address!r}" if address else "the Ray cluster that was started on this machine"
    try:
        asking = subprocess.run(
            child_command(__name__),
            capture_output=True,
            env=child_environment("vllm"),
            preexec_fn=die_with_parent,
            timeout=ASK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise InvalidConfiguration(
            f"{named} does not answer within {ASK_SECONDS:.0f} s: see whether `ray status` does, and start the head "
            "with `ray start --head`"
        ) from None
    if asking.returncode:
        told = asking.stderr.decode(errors="replace").strip().splitlines()
        logger.debug("asking Ray failed: %s", "\n".join(told))
        raise InvalidConfiguration(
            f"{named} cannot be asked for its devices: {told[-1] if told else 'no reason'}"
        )
    answer = json.loads(asking.stdout.splitlines()[-1])
    return None if answer is None else Cluster(**answer)


def _ask() -> dict[str, int] | None:
    """In the process of its own. Raises what Ray raises, unless it is that no cluster was started."""
    import ray

    try:
        ray.init("auto", configure_logging=False, log_to_driver=False)
    except ConnectionError:
        if os.environ.get("RAY_ADDRESS"):
            raise
        return None
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return {"devices": int(sum(one.get("GPU", 0) for one in machines)), "machines": len(machines)}


if __name__ == "__main__":
    print("\n" + json.dumps(_ask()))
