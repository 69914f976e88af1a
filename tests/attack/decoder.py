"""A process that decodes the images it is sent and says what each cost: `python -m tests.attack.decoder`.

In: for each image its length in eight bytes, and the image. Out: a line of JSON for each. What comes before the first
of no bytes only loads the codecs, and is not answered.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from handlers.images import ImageProblem
from handlers.images.decoder import decode, opened, prepare_pillow
from handlers.images.formats import kind_of

MAX_PIXELS = 89_478_485
_LIBC = ctypes.CDLL(None)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    prepare_pillow(MAX_PIXELS)
    while data := _received():
        decode(data, MAX_PIXELS)
    gc.freeze()
    base = _resident("VmRSS")
    while (data := _received()) is not None:
        if len(data) > 2**16:
            gc.collect()
            _LIBC.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
        answer = _cost_of(data)
        answer["bytes"] = len(data)
        answer["kind"] = kind_of(data)
        answer["memory"] = _resident("VmHWM") - base
        answer["children"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        answer["plugins"] = [name for name in Image.OPEN if name not in ("PPM", "MPO", "DIB")]
        print(json.dumps(answer), flush=True)


def _received() -> bytes | None:
    head = sys.stdin.buffer.read(8)
    return sys.stdin.buffer.read(int.from_bytes(head, "big")) if head else None


def _cost_of(data: bytes) -> dict[str, Any]:
    """pixels: by the header; 0 where that was refused. header, seconds: processor time of the header and of all."""
    start = time.process_time()
    pixels, outcome = 0, "decoded"
    try:
        with opened(data, MAX_PIXELS) as opening:
            pixels = opening.width * opening.height
    except ImageProblem as problem:
        outcome = problem.reason
    header = time.process_time() - start
    try:
        image = decode(data, MAX_PIXELS)
        assert image.mode == "RGB"
        assert image.width * image.height == pixels
    except ImageProblem as problem:
        outcome = problem.reason
    except Exception as error:
        outcome = f"raised {error!r}"
    return {"outcome": outcome, "pixels": pixels, "header": header, "seconds": time.process_time() - start}


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) * 1024


if __name__ == "__main__":
    main()
