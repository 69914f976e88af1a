"""Which devices vLLM uses: how many share a replica, in how many stages, and how many replicas there are.

Run as a script, it prints how many devices the Ray cluster has. A process of its own asks Ray, since a Ray driver that
cannot reach its cluster tries for minutes and cannot be interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from handlers.backends.devices import chosen_devices, unused_on
from handlers.backends.estimate import completed, first_number
from handlers.errors import InvalidConfiguration
from processes.environment import child_command, child_environment
from processes.inside import die_with_parent
from properties.model import text_config
from properties.problem import Problem

if TYPE_CHECKING:
    from properties.settings import Settings

logger = logging.getLogger(__name__)

ASK_SECONDS = 30.0
"""How long a Ray cluster may take to answer, including the import of Ray."""

INSTALL = "install ray>=2.40 beside vLLM (pip install 'ray>=2.40')"

_SHARED_TOWERS = frozenset({"clip_vision_model", "siglip_vision_model", "pixtral"})
"""Vision towers that vLLM shares by as many devices as the language model; in some others any number will do."""

_DEGREE = "tensor_parallel_degree"


@dataclass(frozen=True)
class Heads:
    """The heads of a model that the devices of a replica share; `vision` is 0 unless they must share the tower too."""

    attention: int
    key_values: int
    vision: int = 0

    def divide_by(self, degree: int) -> bool:
        """Whether vLLM can give each of so many devices as many query heads, and at least one KV head."""
        shared = self.key_values % degree == 0 or degree % self.key_values == 0
        return self.attention % degree == 0 and shared and self.vision % degree == 0

    def largest_degree(self, most: int) -> int:
        """Return the largest number of devices up to `most` that can share one replica."""
        return next(degree for degree in range(most, 0, -1) if degree == 1 or self.divide_by(degree))

    def __str__(self) -> str:
        tower = f" and its vision tower's {self.vision} heads" if self.vision else ""
        return f"{self.attention} attention and {self.key_values} key/value heads{tower}"


def heads_of(config: Mapping[str, Any]) -> Heads | None:
    """Return the heads that a config.json with its family's defaults states; None if it does not."""
    text = text_config(config)
    attention = first_number(text, "num_attention_heads", "n_head", "n_heads")
    if attention is None:
        return None
    key_values = first_number(text, "num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num")
    if "kv_lora_rank" in text:  # with latent attention the devices share no keys and values
        key_values = None
    tower = config.get("vision_config")
    vision = 0
    if isinstance(tower, Mapping) and tower.get("model_type") in _SHARED_TOWERS:
        vision = first_number(tower, "num_attention_heads") or 0
    return Heads(attention, key_values or attention, vision)


def model_heads(directory: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> Heads | None:
    """Return the heads of a model. Imports transformers if config.json leaves the numbers to the family's defaults.

    With trust_remote_code the family may be the model's own code, which is not run for this.
    """
    if trust_remote_code or {"num_attention_heads", "num_key_value_heads"} <= text_config(config).keys():
        return heads_of(config)
    return heads_of(completed(directory, config))


@dataclass(frozen=True)
class Plan:
    """How many devices are used: `tensor` x `pipeline` hold one replica, and there are `data` replicas.

    available: the devices that may be used, including those of other machines. problems: why it cannot work.
    """

    tensor: int
    pipeline: int
    data: int
    available: int
    machines: int = 1
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    @property
    def needed(self) -> int:
        return self.tensor * self.pipeline * self.data

    def sizes(self) -> dict[str, int]:
        """Return the numbers as `AsyncEngineArgs` names them."""
        return {
            "tensor_parallel_size": self.tensor,
            "pipeline_parallel_size": self.pipeline,
            "data_parallel_size": self.data,
        }

    def __str__(self) -> str:
        return (
            f"option.{_DEGREE} {self.tensor} x option.pipeline_parallel_degree {self.pipeline} x "
            f"option.data_parallel_degree {self.data}"
        )


def plan_devices(settings: Settings, extra: Mapping[str, str], accelerators: int, heads: Heads | None = None) -> Plan:
    """Plan how replicas use the devices.

    Numbers that are `max` or not given are chosen so that they fill this machine, or the machines of the Ray cluster;
    without accelerators they are 1. If Ray is to be used, it is asked for its devices, which takes seconds.

    Args:
        settings: The options.
        extra: vLLM's own options, as text.
        accelerators: The number of this machine's devices.
        heads: Those of the model, if they are known: the devices of a replica must share them evenly.
    """
    if heads is not None and extra.get("mm_encoder_tp_mode", "").strip().lower() == "data":
        heads = replace(heads, vision=0)  # each device has the whole tower
    chosen, problems = chosen_devices(settings, accelerators)
    cluster, nodes, ray = None, _nodes(extra), _uses_ray(extra)
    devices = nodes * len(chosen)
    if ray:
        devices, nodes, problems = accelerators, 1, []
        try:
            if (cluster := running_cluster()) is not None:
                devices, nodes = cluster
        except InvalidConfiguration as error:
            text = f"option.distributed_executor_backend or option.data_parallel_backend is ray, but {error}"
            problems.append(Problem(text))
    stages, replicas = settings.pipeline_parallel_degree, settings.data_parallel_degree
    degree, most = settings.tensor_parallel_degree, devices // stages // (replicas or 1)
    largest = max(1, most) if heads is None else heads.largest_degree(max(1, most))
    ranks = largest if degree == "max" else degree
    if replicas is None and (ray or nodes > 1):
        replicas = 1
    elif replicas is None:
        fitting = max(1, devices // (ranks * stages))
        wanted = settings.max_workers or (fitting if devices else settings.min_workers or 1)
        replicas = min(wanted, fitting) if devices else wanted
    plan = Plan(ranks, stages, replicas, devices, nodes, problems)
    if not (ray and problems):
        _check_count(plan, ray=ray, cluster=cluster)
    if nodes == 1 and not ray:
        plan.warnings.extend(unused_on(settings, devices, replicas, ranks * stages))
    if heads is not None and degree == "max" and ranks < most:
        text = (
            f"option.{_DEGREE} = {degree} is {ranks} here, not {most}: the model's {heads} cannot be shared evenly by "
            f"more; {plan.needed} of {devices} devices are used"
        )
        plan.warnings.append(Problem(text, _DEGREE))
    elif heads is not None and degree != "max" and not heads.divide_by(degree):
        text = (
            f"option.{_DEGREE} = {degree}: the model's {heads} cannot be shared evenly by {degree} devices; the next "
            f"lower degree that works is {heads.largest_degree(degree)}"
        )
        plan.problems.append(Problem(text, _DEGREE))
    return plan


def _check_count(plan: Plan, *, ray: bool, cluster: Cluster | None) -> None:
    """Add what is wrong with the number of devices."""
    devices, machines = plan.available, f"{plan.machines} machine{'s' if plan.machines > 1 else ''}"
    if plan.needed > devices and cluster is not None:
        # Machines may still be joining: vLLM waits for them.
        text = f"the Ray cluster has {devices} on {machines}: the start waits for more"
        plan.warnings.append(Problem(f"{plan} needs {plan.needed} devices, but {text}", _DEGREE))
    elif plan.needed > devices and (devices or ray):
        if ray:
            text = (
                "no Ray cluster runs, so vLLM would start one of this machine alone; run `ray start --head` here and "
                "`ray start --address HEAD:6379` on the other machines first"
            )
        elif plan.machines > 1:
            text = f"were the {machines} all like this one: lower one"
        else:
            text = "lower one, or use more machines (option.distributed_executor_backend=ray)"
        there = f"{devices} are there{',' if plan.machines > 1 else ':'} {text}"
        plan.problems.append(Problem(f"{plan} needs {plan.needed} devices, but {there}", _DEGREE))
    if not ray and plan.needed % plan.machines:
        # vLLM's own launcher uses as many devices on each machine.
        text = (
            f"option.nnodes = {plan.machines}, but {plan.needed} processes ({plan}) cannot be shared evenly by "
            f"{machines}: change one"
        )
        plan.problems.append(Problem(text, _DEGREE))


def choose_devices(settings: Settings, accelerators: int) -> None:
    """Let this process and its children see only the devices of `load_on_devices`."""
    if settings.load_on_devices == "*" or accelerators == 0:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(number) for number in range(accelerators)]
    chosen, _ = chosen_devices(settings, min(accelerators, len(names)))
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[number] for number in chosen)


def share_cores(ranks: int) -> None:
    """On a CPU, give each of several ranks cores of its own, unless the operator has assigned them.

    vLLM assigns them itself only where there is a NUMA node for each rank.
    """
    if ranks < 2:
        return
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // ranks
    groups = [cores[rank * each : (rank + 1) * each] for rank in range(ranks)]
    bound = "|".join(",".join(map(str, group)) for group in groups) if each else "nobind"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", bound)


def follows(extra: Mapping[str, str]) -> bool:
    """Whether another machine answers requests, with this one holding a part of the model."""
    rank = extra.get("node_rank", "0").strip()
    return _nodes(extra) > 1 and rank.isdecimal() and rank.strip("0") != ""


def _nodes(extra: Mapping[str, str]) -> int:
    """Return `nnodes`; what is not a number is refused by vLLM's own check."""
    nodes = extra.get("nnodes", "1").strip()
    return int(nodes) if nodes.isdecimal() and len(nodes) < 6 else 1


def _uses_ray(extra: Mapping[str, str]) -> bool:
    named = (extra.get("distributed_executor_backend"), extra.get("data_parallel_backend"))
    return "ray" in (name.strip().lower() for name in named if name is not None)


class Cluster(NamedTuple):
    """The machines of a Ray cluster that are up, and their devices."""

    devices: int
    machines: int


def running_cluster() -> Cluster | None:
    """Return the Ray cluster that RAY_ADDRESS names, or the one of this machine; None if vLLM would start one.

    Blocks for seconds the first time. Raises InvalidConfiguration without ray, and if the cluster does not answer.
    """
    if find_spec("ray") is None:
        raise InvalidConfiguration(f"ray is not installed: {INSTALL}")
    return _asked(os.environ.get("RAY_ADDRESS", ""))


@cache
def _asked(address: str) -> Cluster | None:
    if address == "local":  # tells Ray to start one
        return None
    named = f"RAY_ADDRESS = {address!r}" if address else "the Ray cluster that was started on this machine"
    try:
        asking = subprocess.run(
            child_command("handlers.backends.vllm.devices"),
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
        lines = asking.stderr.decode(errors="replace").strip().splitlines()
        logger.debug("asking Ray failed: %s", "\n".join(lines))
        raise InvalidConfiguration(f"{named} cannot be asked for its devices: {lines[-1] if lines else 'no reason'}")
    answer = json.loads(asking.stdout.splitlines()[-1])
    return None if answer is None else Cluster(*answer)


def _ask() -> tuple[int, int] | None:
    """Count the devices and machines; None if no cluster runs. Raises what Ray raises."""
    import ray

    try:
        ray.init("auto", configure_logging=False, log_to_driver=False)
    except ConnectionError:
        if os.environ.get("RAY_ADDRESS"):
            raise
        return None
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return int(sum(one.get("GPU", 0) for one in machines)), len(machines)


if __name__ == "__main__":
    print("\n" + json.dumps(_ask()))
