"""Loads the compiled code, and declares its functions as the C files next to this one define them."""

from __future__ import annotations

import ctypes
import logging
import platform
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from importlib.util import find_spec

import torch

logger = logging.getLogger(__name__)


class Cache(ctypes.Structure):
    """A layer's paged cache (`attention.c`)."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("head_stride", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("block_size", c_int64),
        ("bfloat16", c_int64),
    )


class Decodes(ctypes.Structure):
    """The sequences of a step, one query each (`attention.c`)."""

    _fields_ = (
        ("tables", c_void_p),
        ("contexts", c_void_p),
        ("rows", c_int64),
        ("width", c_int64),
    )


@cache
def compiled() -> ctypes.CDLL | None:
    """Load the compiled code; None, and a line in the log that says why, where it cannot run."""
    spec = find_spec("engine.native._native")
    x86 = platform.machine() == "x86_64"
    if spec is None or spec.origin is None:
        problem = "there was no C compiler that could build it when this was installed"
    elif x86 and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        problem = "the processor has no AVX2"
    else:
        try:
            return _declared(ctypes.CDLL(spec.origin))
        except OSError as error:
            problem = str(error)
    logger.info("decode steps run in torch, which is slower than compiled code: %s", problem)
    return None


@cache
def multiplies() -> bool:
    """Tell whether `products.c` can run here and is faster than oneDNN, which uses AMX where there is AMX."""
    library = compiled()
    return (
        library is not None
        and hasattr(library, "multiply_bfloat16")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.cpu._is_avx512_bf16_supported()
        and not torch.cpu._is_amx_tile_supported()
    )


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    functions = {
        "attend_decodes": (
            *(ctypes.POINTER(Cache), ctypes.POINTER(Decodes), c_void_p, c_int64, c_int64, c_void_p),
            *(c_float, c_int64, c_float, c_int64),
        ),
        "multiply_bfloat16": (c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64),
        "round_rows": (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p),
        "multiply_int8": (
            *(c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
            *(c_int64, c_int64, c_int64),
        ),
    }
    for name, arguments in functions.items():
        function = getattr(library, name, None)  # those of products.c need x86 and gcc 10
        if function is not None:
            function.restype, function.argtypes = None, arguments
    return library
