"""vLLM's CPU platform has no Ray resource, so vLLM refuses to use Ray on a CPU. For tests: the same platform with one.

Ray counts whatever `ray start --num-gpus` says. Installed as a plugin (`install`), since every process of vLLM, those
that Ray starts included, must find it before anything else.
"""

from __future__ import annotations

from pathlib import Path

_PLUGIN = {
    "ray_on_cpu.py": 'def platform():\n    return "ray_on_cpu_platform.RayOnCpu"\n',
    "ray_on_cpu_platform.py": (
        'from vllm.platforms.cpu import CpuPlatform\n\n\nclass RayOnCpu(CpuPlatform):\n    ray_device_key = "GPU"\n'
    ),
    "ray_on_cpu-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: ray-on-cpu\nVersion: 1\n",
    "ray_on_cpu-1.dist-info/entry_points.txt": "[vllm.platform_plugins]\nray_on_cpu = ray_on_cpu:platform\n",
}


def install(directory: Path) -> str:
    """Write the plugin; returns what PYTHONPATH must hold for it."""
    for name, text in _PLUGIN.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(directory)
