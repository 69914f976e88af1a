"""Which variables a child process of ours is given, and why.

| child | gets |
|---|---|
| engine and its ranks | what Python, the devices, the compute libraries and a local model need, by name |
| grammar compilers, image decoders, the guard of vLLM's processes | what Python and the system need, by name |
| the model's own handler | everything but the server's own keys: it is the operator's program and reads what it likes |
| the server of one of several models | everything but the server's own keys: it starts all of these |
| vLLM, on any machine, and questions to Ray | everything but the server's own keys: vLLM copies the environment to its workers itself, and may read weights with the operator's credentials |
"""  # noqa: E501

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Literal

SERVER_KEYS = frozenset(
    {"SERVING_API_KEY", "OPTION_API_KEY", "VLLM_API_KEY", "APHRODITE_API_KEY", "SM_VLLM_API_KEY", "SM_SGLANG_API_KEY"}
)
"""Every variable that can hold the keys that clients must send. Only the server's own process needs them."""

_SYSTEM = frozenset(
    {"PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT"}
)
_SYSTEM_FAMILIES = ("LC_", "LD_", "DYLD_", "PYTHON", "MALLOC_")

_COMPUTE = frozenset({"XDG_CACHE_HOME", "CC", "CXX", "CPATH", "LIBRARY_PATH"})
"""XDG_CACHE_HOME holds compiled kernels; the others are for the compiler that Triton and torch call."""

_COMPUTE_FAMILIES = (
    "CUDA_", "NVIDIA_", "CUBLAS_", "CUDNN_", "NCCL_", "GLOO_", "UCX_",
    "ROCM_", "ROCR_", "HIP_", "HSA_", "MIOPEN_", "RCCL_",
    "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "DNNL_", "ONEDNN_", "ATEN_",
    "TORCH", "PYTORCH_", "TRITON_", "XFORMERS_", "SAFETENSORS_",
)  # fmt: skip

_MODEL_FAMILIES = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "RAYON_")
"""Caches, offline mode and threads of the libraries that read a model's files, all local."""

_CREDENTIALS = ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "API_KEY")
"""A variable of the families above whose name contains one of these is not passed on, whatever it means."""

_BY_NAME: dict[str, tuple[frozenset[str], tuple[str, ...]]] = {
    "engine": (_SYSTEM | _COMPUTE, _SYSTEM_FAMILIES + _COMPUTE_FAMILIES + _MODEL_FAMILIES),
    "plain": (_SYSTEM, (*_SYSTEM_FAMILIES, "OMP_", "OPENBLAS_", "RAYON_")),
}

Kind = Literal["engine", "plain", "handler", "server", "vllm"]


def child_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs one of our modules as a child; `child_environment` gives its variables."""
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment(kind: Kind, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment variables of a child process, with our packages importable.

    They are named because `python -P` keeps the working directory out of the module path. environ: the variables to
    choose from; by default those of this process.
    """
    given = os.environ if environ is None else environ
    if kind in _BY_NAME:
        chosen = {name: value for name, value in given.items() if _needs(kind, name)}
    else:
        chosen = {name: value for name, value in given.items() if name not in SERVER_KEYS}
    root = str(Path(__file__).resolve().parent.parent)
    inherited = given.get("PYTHONPATH")
    chosen["PYTHONPATH"] = f"{root}{os.pathsep}{inherited}" if inherited else root
    return chosen


def forget_keys(environ: MutableMapping[str, str] | None = None) -> None:
    """Remove the server's keys from this process's variables, once they are read.

    Libraries that start processes of their own copy the variables.
    """
    for name in SERVER_KEYS:
        (os.environ if environ is None else environ).pop(name, None)


def _needs(kind: str, name: str) -> bool:
    names, families = _BY_NAME[kind]
    if name in names:
        return True
    rest = name.removeprefix("TOKENIZERS_")  # the family whose own name holds such a word
    return name.startswith(families) and not any(word in rest for word in _CREDENTIALS)
