"""AWS's instance types as machines, so that a model can be measured against one without starting it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from engine.machine import Device, Machine

_PREFIX = "ml."
"""SageMaker's names are EC2's with this before them."""


@dataclass(frozen=True)
class Instance:
    """An instance type of EC2.

    Attributes:
        name: EC2's name; SageMaker's has "ml." before it.
        gpus: How many accelerators it has.
        gpu: One of them; None if there are none.
        vcpus: How many virtual processors it has.
        memory: Host memory in bytes.
    """

    name: str
    gpus: int
    gpu: Device | None
    vcpus: int
    memory: int

    @property
    def machine(self) -> Machine:
        """What the estimate measures against.

        Of the GPUs only the T4 does not compute in bfloat16; the processors of m7i and c7i do, with AMX.
        """
        accelerators = () if self.gpu is None else (self.gpu,) * self.gpus
        host = Device("host memory", self.memory)
        return Machine(accelerators, host, name=self.name, bfloat16=self.gpu is not _T4)


# Named as the driver names them. Memory is the smaller of what AWS states (DescribeInstanceTypes,
# GpuInfo.Gpus[].MemoryInfo) and the total that nvidia-smi shows, in MiB: AWS has 16384 for the T4, 81920 for the H100
# and 144384 for the H200; nvidia-smi has 23028 for the A10G, 23034 for the L4 and 46068 for the L40S.
_T4 = Device("Tesla T4", 15360 << 20)
_A10G = Device("NVIDIA A10G", 22888 << 20)
_L4 = Device("NVIDIA L4", 22888 << 20)
_L40S = Device("NVIDIA L40S", 45776 << 20)
_A100_40 = Device("NVIDIA A100-SXM4-40GB", 40960 << 20)
_A100_80 = Device("NVIDIA A100-SXM4-80GB", 81920 << 20)
_H100 = Device("NVIDIA H100 80GB HBM3", 81559 << 20)
_H200 = Device("NVIDIA H200", 143771 << 20)

# Size -> GPUs, vCPUs, GiB of host memory. From the list that Karpenter generates from AWS's DescribeInstanceTypes,
# https://karpenter.sh/docs/reference/instance-types/; AWS's own pages are
# https://docs.aws.amazon.com/ec2/latest/instancetypes/ac.html (GPUs), gp.html (m7i) and co.html (c7i).
_G5_AND_G6 = {
    "xlarge": (1, 4, 16), "2xlarge": (1, 8, 32), "4xlarge": (1, 16, 64), "8xlarge": (1, 32, 128),
    "16xlarge": (1, 64, 256), "12xlarge": (4, 48, 192), "24xlarge": (4, 96, 384), "48xlarge": (8, 192, 768),
}  # fmt: skip
_FAMILIES: dict[str, tuple[Device | None, dict[str, tuple[int, int, int]]]] = {
    "g4dn": (_T4, {
        "xlarge": (1, 4, 16), "2xlarge": (1, 8, 32), "4xlarge": (1, 16, 64), "8xlarge": (1, 32, 128),
        "16xlarge": (1, 64, 256), "12xlarge": (4, 48, 192),
    }),
    "g5": (_A10G, _G5_AND_G6),
    "g6": (_L4, _G5_AND_G6),
    "g6e": (_L40S, {
        "xlarge": (1, 4, 32), "2xlarge": (1, 8, 64), "4xlarge": (1, 16, 128), "8xlarge": (1, 32, 256),
        "16xlarge": (1, 64, 512), "12xlarge": (4, 48, 384), "24xlarge": (4, 96, 768), "48xlarge": (8, 192, 1536),
    }),
    "p4d": (_A100_40, {"24xlarge": (8, 96, 1152)}),
    "p4de": (_A100_80, {"24xlarge": (8, 96, 1152)}),
    "p5": (_H100, {"4xlarge": (1, 16, 256), "48xlarge": (8, 192, 2048)}),
    "p5e": (_H200, {"48xlarge": (8, 192, 2048)}),
    "p5en": (_H200, {"48xlarge": (8, 192, 2048)}),
    "m7i": (None, {"2xlarge": (0, 8, 32), "4xlarge": (0, 16, 64), "8xlarge": (0, 32, 128)}),
    "c7i": (None, {"4xlarge": (0, 16, 32), "8xlarge": (0, 32, 64), "16xlarge": (0, 64, 128)}),
}  # fmt: skip


INSTANCES = {
    f"{family}.{size}": Instance(f"{family}.{size}", gpus, gpu, vcpus, memory << 30)
    for family, (gpu, sizes) in _FAMILIES.items()
    for size, (gpus, vcpus, memory) in sizes.items()
}
"""By EC2's name."""


def instance_of(name: str) -> Instance:
    """Return the instance of that name, EC2's or SageMaker's. Raises ValueError, which suggests similar names."""
    bare = name.strip().lower().removeprefix(_PREFIX)
    if bare in INSTANCES:
        return INSTANCES[bare]
    near = difflib.get_close_matches(bare, INSTANCES, n=3)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise ValueError(f"unknown instance {name!r}: {hint}known are sizes of {', '.join(_FAMILIES)}, and all")
