"""Which devices vLLM uses: how many share a copy of the model, in how many stages, and how many copies there are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from handlers.backends.unused import unused_on
from handlers.backends.vllm.nodes.cluster import running_cluster
from handlers.backends.vllm.options.heads import Heads
from handlers.errors import InvalidConfiguration
from properties.problem import Problem

if TYPE_CHECKING:
    from properties.settings import Settings


@dataclass(frozen=True)
class Plan:
    """tensor x pipeline devices hold one copy; data copies share the load.

    available: devices that may be used, those of the other machines included. machines: where they are.
    problems: why it cannot work. warnings: why it may not.
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
        """As `AsyncEngineArgs` names them."""
        return {
            "tensor_parallel_size": self.tensor,
            "pipeline_parallel_size": self.pipeline,
            "data_parallel_size": self.data,
        }


def plan_devices(
    settings: Settings, extra: Mapping[str, str], accelerators: int, heads: Heads | None = None
) -> Plan:
    """`max` and what nobody wrote is made to fill this machine, or the machines of the Ray cluster; without
    accelerators, it is 1.

    extra: options of vLLM's own, as text. accelerators: devices of this machine. Where Ray is to be used, it is asked
    for its devices: seconds. heads: of the model, where they are known: devices that share a copy share them evenly.
    """
    if heads is not None and extra.get("mm_encoder_tp_mode", "").strip().lower() == "data":
        heads = replace(heads, vision=0)  # each device has the whole tower
    if uses_ray(extra):
        plan = _across_ray(settings, accelerators, heads)
    elif (nodes := _nodes(extra)) > 1:
        plan = _across_nodes(settings, extra, nodes, accelerators, heads)
    else:
        plan = _on_this_machine(settings, accelerators, heads)
        ranks = plan.tensor * plan.pipeline
        plan.warnings.extend(unused_on(settings, plan.available, plan.data, ranks))
    if heads is not None:
        _tell_of_heads(plan, settings, heads)
    return plan


def _on_this_machine(settings: Settings, accelerators: int, heads: Heads | None) -> Plan:
    problems: list[Problem] = []
    degree, stages, copies = _degrees(settings)
    devices = len(_chosen(settings, accelerators, problems))
    if devices == 0:
        ranks = 1 if degree == "max" else degree
        return Plan(
            ranks, stages, copies or settings.max_workers or settings.min_workers or 1, 0, problems=problems
        )
    ranks = _ranks(degree, devices // stages // (copies or 1), heads)
    fitting = max(1, devices // (ranks * stages))
    plan = Plan(
        ranks, stages, copies or min(settings.max_workers or fitting, fitting), devices, problems=problems
    )
    if plan.needed > devices:
        more = "lower one, or use more machines (option.distributed_executor_backend=ray)"
        problems.append(_too_few(plan, f"{devices} are there: {more}"))
    return plan


def uses_ray(extra: Mapping[str, str]) -> bool:
    """Whether the options have vLLM find its devices through Ray."""
    named = (extra.get("distributed_executor_backend"), extra.get("data_parallel_backend"))
    return "ray" in (name.strip().lower() for name in named if name is not None)


def _across_ray(settings: Settings, accelerators: int, heads: Heads | None) -> Plan:
    degree, stages, copies = _degrees(settings)
    try:
        cluster = running_cluster()
    except InvalidConfiguration as error:
        problem = Problem(
            f"option.distributed_executor_backend or option.data_parallel_backend is ray, but {error}"
        )
        return Plan(1 if degree == "max" else degree, stages, copies or 1, accelerators, problems=[problem])
    devices, machines = (accelerators, 1) if cluster is None else (cluster.devices, cluster.machines)
    ranks = _ranks(degree, devices // stages // (copies or 1), heads)
    plan = Plan(ranks, stages, copies or 1, devices, machines)
    if plan.needed > devices and cluster is None:
        plan.problems.append(
            _too_few(
                plan,
                f"{devices} are there: no Ray cluster runs, so vLLM would start one of this machine alone; run "
                "`ray start --head` here and `ray start --address HEAD:6379` on the other machines first",
            )
        )
    elif plan.needed > devices:
        # Machines may still be joining: vLLM waits for them.
        plan.warnings.append(
            _too_few(plan, f"the Ray cluster has {devices} on {_counted(machines)}: the start waits for more")
        )
    return plan


def _across_nodes(
    settings: Settings, extra: Mapping[str, str], nodes: int, accelerators: int, heads: Heads | None
) -> Plan:
    """vLLM's own launcher, which takes as many devices of each machine."""
    degree, stages, copies = _degrees(settings)
    problems: list[Problem] = []
    devices = nodes * len(_chosen(settings, accelerators, problems))
    ranks = _ranks(degree, devices // stages // (copies or 1), heads)
    plan = Plan(ranks, stages, copies or 1, devices, nodes, problems)
    if plan.needed > devices > 0:
        problems.append(
            _too_few(plan, f"{devices} are there, were the {_counted(nodes)} all like this one: lower one")
        )
    if plan.needed % nodes:
        problems.append(
            Problem(
                f"option.nnodes = {nodes}, but {plan.needed} processes ({_product(plan)}) cannot be shared evenly "
                f"by {_counted(nodes)}: change one",
                "tensor_parallel_degree",
            )
        )
    return plan


def _degrees(settings: Settings) -> tuple[int | Literal["max"], int, int | None]:
    return settings.tensor_parallel_degree, settings.pipeline_parallel_degree, settings.data_parallel_degree


def _ranks(degree: int | Literal["max"], most: int, heads: Heads | None) -> int:
    """most: what `max` comes to where the model's heads allow it."""
    if degree != "max":
        return degree
    return max(1, most) if heads is None else heads.largest_degree(max(1, most))


def _tell_of_heads(plan: Plan, settings: Settings, heads: Heads) -> None:
    degree, stages, copies = _degrees(settings)
    most = plan.available // stages // (copies or 1)
    if degree == "max" and plan.tensor < most:
        plan.warnings.append(
            Problem(
                f"option.tensor_parallel_degree = max is {plan.tensor} here, not {most}: the model's {heads} cannot be "
                f"shared evenly by more; {plan.needed} of {plan.available} devices are used",
                "tensor_parallel_degree",
            )
        )
    elif degree != "max" and not heads.divide_by(degree):
        plan.problems.append(
            Problem(
                f"option.tensor_parallel_degree = {degree}: the model's {heads} cannot be shared evenly by {degree} "
                f"devices; the next lower degree that works is {heads.largest_degree(degree)}",
                "tensor_parallel_degree",
            )
        )


def _product(plan: Plan) -> str:
    return (
        f"option.tensor_parallel_degree {plan.tensor} x option.pipeline_parallel_degree {plan.pipeline} x "
        f"option.data_parallel_degree {plan.data}"
    )


def _too_few(plan: Plan, rest: str) -> Problem:
    return Problem(f"{_product(plan)} needs {plan.needed} devices, but {rest}", "tensor_parallel_degree")


def _counted(machines: int) -> str:
    return "1 machine" if machines == 1 else f"{machines} machines"


def choose_devices(settings: Settings, accelerators: int) -> None:
    """Let this process and its children see only the devices of `load_on_devices`."""
    if settings.load_on_devices == "*" or accelerators == 0:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(number) for number in range(accelerators)]
    chosen = _chosen(settings, min(accelerators, len(names)), [])
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[number] for number in chosen)


def share_cores(ranks: int) -> None:
    """On a CPU: give each of several ranks cores of its own, unless the operator has said which.

    vLLM finds them by itself only where there is a NUMA node for each rank.
    """
    if ranks < 2:
        return
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // ranks
    groups = [cores[rank * each : (rank + 1) * each] for rank in range(ranks)]
    bound = "|".join(",".join(map(str, group)) for group in groups) if each else "nobind"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", bound)


def follows(extra: Mapping[str, str]) -> bool:
    """Whether another machine than this one answers requests, for which this one holds a part of the model."""
    rank = extra.get("node_rank", "0").strip()
    return _nodes(extra) > 1 and rank.isdecimal() and rank.strip("0") != ""


def _nodes(extra: Mapping[str, str]) -> int:
    """What is not a number, vLLM's own check refuses."""
    nodes = extra.get("nnodes", "1").strip()
    return int(nodes) if nodes.isdecimal() and len(nodes) < 6 else 1


def _chosen(settings: Settings, accelerators: int, problems: list[Problem]) -> list[int]:
    wanted = settings.load_on_devices
    if wanted == "*" or accelerators == 0:
        return list(range(accelerators))
    for number in wanted:
        if number >= accelerators:
            problems.append(
                Problem(
                    f"load_on_devices names {number}, but the devices are 0 to {accelerators - 1}",
                    "load_on_devices",
                )
            )
    return [number for number in wanted if number < accelerators]
