"""Which devices vLLM uses: how many share a replica, in how many stages, and how many replicas there are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from handlers.backends.unused import unused_on
from handlers.backends.vllm.nodes.cluster import running_cluster
from handlers.errors import InvalidConfiguration
from properties.model import text_config
from properties.problem import Problem

if TYPE_CHECKING:
    from properties.settings import Settings

_SHARED_TOWERS = frozenset({"clip_vision_model", "siglip_vision_model", "pixtral"})
"""Vision towers that vLLM shares by as many devices as the language model; in some others any number will do."""


@dataclass(frozen=True)
class Heads:
    """The heads of a model that the devices of a replica share.

    attention: query heads of the language model. key_values: its KV heads. vision: heads of the tower, where its
    devices must share it evenly, too; else 0.
    """

    attention: int
    key_values: int
    vision: int = 0

    def divide_by(self, degree: int) -> bool:
        """Whether vLLM can give each of so many devices as many query heads, and one KV head or more to each."""
        shared = self.key_values % degree == 0 or degree % self.key_values == 0
        return self.attention % degree == 0 and shared and self.vision % degree == 0

    def largest_degree(self, most: int) -> int:
        """The largest number of devices up to `most` that can share one replica."""
        return next(degree for degree in range(most, 0, -1) if degree == 1 or self.divide_by(degree))

    def __str__(self) -> str:
        tower = f" and its vision tower's {self.vision} heads" if self.vision else ""
        return f"{self.attention} attention and {self.key_values} key/value heads{tower}"


def heads_of(config: Mapping[str, Any]) -> Heads | None:
    """From a config.json with its family's defaults filled in; None where it does not say."""
    text = text_config(config)
    attention = _count(text, "num_attention_heads", "n_head", "n_heads")
    if attention is None:
        return None
    key_values = _count(text, "num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num")
    if "kv_lora_rank" in text:  # with latent attention the devices share no keys and values
        key_values = None
    tower = config.get("vision_config")
    vision = None
    if isinstance(tower, Mapping) and tower.get("model_type") in _SHARED_TOWERS:
        vision = _count(tower, "num_attention_heads")
    return Heads(attention, key_values or attention, vision or 0)


def model_heads(directory: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> Heads | None:
    """Of a model directory. Imports transformers where config.json leaves the numbers to the family's defaults.

    With trust_remote_code the family may be the model's own code, which is not run for this.
    """
    if trust_remote_code or {"num_attention_heads", "num_key_value_heads"} <= text_config(config).keys():
        return heads_of(config)
    from transformers import AutoConfig

    try:
        return heads_of(AutoConfig.from_pretrained(directory, local_files_only=True).to_dict())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _count(config: Mapping[str, Any], *names: str) -> int | None:
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


@dataclass(frozen=True)
class Plan:
    """tensor x pipeline devices hold one replica; data replicas share the load.

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
    """Plan how replicas use the devices.

    Numbers that are `max` or not given are chosen so that they fill this machine, or the machines of the Ray cluster;
    without accelerators they are 1. If Ray is to be used, it is asked for its devices, which takes seconds.

    Args:
        settings: The options.
        extra: vLLM's own options, as text.
        accelerators: The devices of this machine.
        heads: The model's attention heads, if they are known: the devices of a replica must share them evenly.
    """
    if heads is not None and extra.get("mm_encoder_tp_mode", "").strip().lower() == "data":
        heads = replace(heads, vision=0)  # each device has the whole tower
    if uses_ray(extra):
        plan = _across_ray(settings, accelerators, heads)
    elif (nodes := _nodes(extra)) > 1:
        plan = _across_nodes(settings, nodes, accelerators, heads)
    else:
        plan = _on_this_machine(settings, accelerators, heads)
    if heads is not None:
        _check_heads(plan, settings, heads)
    return plan


def _on_this_machine(settings: Settings, accelerators: int, heads: Heads | None) -> Plan:
    problems: list[Problem] = []
    stages, replicas = settings.pipeline_parallel_degree, settings.data_parallel_degree
    devices = len(_chosen(settings, accelerators, problems))
    ranks = _ranks(settings, devices, heads)
    if replicas is None:
        fitting = max(1, devices // (ranks * stages))
        most = settings.max_workers or (fitting if devices else settings.min_workers or 1)
        replicas = min(most, fitting) if devices else most
    plan = Plan(ranks, stages, replicas, devices, problems=problems)
    if plan.needed > devices > 0:
        more = "lower one, or use more machines (option.distributed_executor_backend=ray)"
        problems.append(_too_few(plan, f"{devices} are there: {more}"))
    plan.warnings.extend(unused_on(settings, devices, replicas, ranks * stages))
    return plan


def uses_ray(extra: Mapping[str, str]) -> bool:
    """Whether the options have vLLM find its devices through Ray."""
    named = (extra.get("distributed_executor_backend"), extra.get("data_parallel_backend"))
    return "ray" in (name.strip().lower() for name in named if name is not None)


def _across_ray(settings: Settings, accelerators: int, heads: Heads | None) -> Plan:
    stages, replicas = settings.pipeline_parallel_degree, settings.data_parallel_degree or 1
    try:
        cluster = running_cluster()
    except InvalidConfiguration as error:
        problem = Problem(
            f"option.distributed_executor_backend or option.data_parallel_backend is ray, but {error}"
        )
        return Plan(_ranks(settings, 1, None), stages, replicas, accelerators, problems=[problem])
    devices, machines = (accelerators, 1) if cluster is None else (cluster.devices, cluster.machines)
    plan = Plan(_ranks(settings, devices, heads), stages, replicas, devices, machines)
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


def _across_nodes(settings: Settings, nodes: int, accelerators: int, heads: Heads | None) -> Plan:
    """vLLM's own launcher, which takes as many devices of each machine."""
    problems: list[Problem] = []
    devices = nodes * len(_chosen(settings, accelerators, problems))
    stages, replicas = settings.pipeline_parallel_degree, settings.data_parallel_degree or 1
    plan = Plan(_ranks(settings, devices, heads), stages, replicas, devices, nodes, problems)
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


def _most(settings: Settings, devices: int) -> int:
    """What tensor_parallel_degree `max` comes to where the model's heads allow it."""
    return devices // settings.pipeline_parallel_degree // (settings.data_parallel_degree or 1)


def _ranks(settings: Settings, devices: int, heads: Heads | None) -> int:
    degree: int | Literal["max"] = settings.tensor_parallel_degree
    if degree != "max":
        return degree
    most = max(1, _most(settings, devices))
    return most if heads is None else heads.largest_degree(most)


def _check_heads(plan: Plan, settings: Settings, heads: Heads) -> None:
    degree, most = settings.tensor_parallel_degree, _most(settings, plan.available)
    option = f"option.tensor_parallel_degree = {degree}"
    if degree == "max" and plan.tensor < most:
        text = (
            f"{option} is {plan.tensor} here, not {most}: the model's {heads} cannot be shared evenly by more; "
            f"{plan.needed} of {plan.available} devices are used"
        )
        plan.warnings.append(Problem(text, "tensor_parallel_degree"))
    elif degree != "max" and not heads.divide_by(degree):
        text = (
            f"{option}: the model's {heads} cannot be shared evenly by {degree} devices; the next lower degree that "
            f"works is {heads.largest_degree(degree)}"
        )
        plan.problems.append(Problem(text, "tensor_parallel_degree"))


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
    problems += [
        Problem(
            f"load_on_devices names {number}, but the devices are 0 to {accelerators - 1}", "load_on_devices"
        )
        for number in wanted
        if number >= accelerators
    ]
    return [number for number in wanted if number < accelerators]
