"""Which devices vLLM uses: how many share a copy of the model, in how many stages, and how many copies there are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from properties.problem import Problem

if TYPE_CHECKING:
    from properties.settings import Settings


@dataclass(frozen=True)
class Plan:
    """tensor x pipeline devices hold one copy; data copies share the load.

    available: devices of this machine that may be used; None where other machines' count as well.
    """

    tensor: int
    pipeline: int
    data: int
    available: int | None
    problems: list[Problem] = field(default_factory=list)

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


def plan_devices(settings: Settings, extra: Mapping[str, str], accelerators: int) -> Plan:
    """`max` and what nobody wrote is made to fill this machine; without accelerators, it is 1.

    extra: options of vLLM's own, as text. accelerators: devices of this machine.
    """
    problems: list[Problem] = []
    degree, stages, copies = (
        settings.tensor_parallel_degree,
        settings.pipeline_parallel_degree,
        settings.data_parallel_degree,
    )
    if _spans_machines(extra):
        if degree == "max":
            problems.append(
                Problem(
                    "option.tensor_parallel_degree = 'max': with devices of several machines, write how many "
                    "share one copy of the model",
                    "tensor_parallel_degree",
                )
            )
        return Plan(1 if degree == "max" else degree, stages, copies or 1, None, problems)
    devices = len(_chosen(settings, accelerators, problems))
    if devices == 0:
        ranks = 1 if degree == "max" else degree
        return Plan(ranks, stages, copies or settings.max_workers or 1, None, problems)
    ranks = max(1, devices // stages // (copies or 1)) if degree == "max" else degree
    fitting = max(1, devices // (ranks * stages))
    plan = Plan(ranks, stages, copies or min(settings.max_workers or fitting, fitting), devices, problems)
    if plan.needed > devices:
        problems.append(
            Problem(
                f"option.tensor_parallel_degree {ranks} x option.pipeline_parallel_degree {stages} x "
                f"option.data_parallel_degree {plan.data} needs {plan.needed} devices, but {devices} are there: "
                "lower one, or use more machines (option.distributed_executor_backend=ray)",
                "tensor_parallel_degree",
            )
        )
    return plan


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


def _spans_machines(extra: Mapping[str, str]) -> bool:
    nodes = extra.get("nnodes", "1")
    return "ray" in (extra.get("distributed_executor_backend"), extra.get("data_parallel_backend")) or (
        nodes.isdecimal() and int(nodes) > 1
    )


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
