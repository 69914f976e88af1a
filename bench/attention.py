"""One-token queries: milliseconds per layer of each kernel that runs here, and of `scaled_dot_product_attention`.

The latter gets its keys and values already gathered, so it does not pay for the paged cache.

python -m bench.attention [--threads 2] [--device cpu]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import scaled_dot_product_attention

from engine.attention.kernel import AttentionKernel, CacheShape, PackedStep
from engine.attention.reference import ReferenceKernel
from engine.attention.select import DEFAULT_BLOCK_SIZE, KERNELS

LAYERS = 12


@dataclass(frozen=True)
class Case:
    batch: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.batch} requests, context {self.context}, {self.heads}/{self.kv_heads} heads of "
            f"{self.head_dim}, {dtype}"
        )


CASES = [
    *(Case(16, 192, 16, 8, dim, dtype) for dim in (64, 128) for dtype in (torch.bfloat16, torch.float32)),
    *(Case(32, 150, 4, 4, 32, dtype) for dtype in (torch.bfloat16, torch.float32)),
    Case(16, 704, 32, 8, 128, torch.bfloat16),
]


def milliseconds(step: Callable[[], None], device: torch.device, seconds: float) -> float:
    """Return the time of a step: the slowest of the fastest tenth of as many steps as fit into the time.

    Delays caused by other work on the machine are not a property of the kernel.
    """
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[len(times) // 10]


def kernel_step(case: Case, kernel: AttentionKernel) -> Callable[[], None]:
    """Prepare a decode step through all layers, with a full cache whose blocks are scattered."""
    size, device = kernel.shape.block_size, kernel.shape.device
    width = kernel.shape.num_blocks // case.batch
    blocks = torch.randperm(kernel.shape.num_blocks).tolist()
    tables = [blocks[i * width : (i + 1) * width] for i in range(case.batch)]

    def packed(length: int, context: int) -> PackedStep:
        slots = [
            table[place // size] * size + place % size for table in tables for place in range(context - length, context)
        ]
        starts = [length * i for i in range(case.batch + 1)]
        decodes = case.batch if length == 1 else 0
        return PackedStep(starts, [context] * case.batch, tables, torch.tensor(slots, device=device), decodes, size)

    def tokens(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = (
            torch.randn(count, heads, case.head_dim, device=device).to(case.dtype)
            for heads in (case.heads, case.kv_heads, case.kv_heads)
        )
        return query, key, value

    kernel.begin(packed(case.context - 1, case.context - 1))
    for layer in range(LAYERS):
        kernel.attend(layer, *tokens(case.batch * (case.context - 1)), scale=case.head_dim**-0.5)
    step, (query, key, value) = packed(1, case.context), tokens(case.batch)

    def run() -> None:
        kernel.begin(step)
        for layer in range(LAYERS):
            kernel.attend(layer, query, key, value, scale=case.head_dim**-0.5)

    return run


def sdpa_step(case: Case, device: torch.device) -> Callable[[], None]:
    """Prepare the usual way: keys and values padded and gathered, a boolean mask, shared key heads."""
    query = torch.randn(case.batch, case.heads, 1, case.head_dim, device=device).to(case.dtype)
    cache = torch.randn(LAYERS, 2, case.batch, case.kv_heads, case.context, case.head_dim, device=device).to(case.dtype)
    mask = torch.ones(case.batch, 1, 1, case.context, dtype=torch.bool, device=device)

    def run() -> None:
        for keys, values in cache:
            scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=case.heads != case.kv_heads)

    return run


def candidates(case: Case, device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    shape = CacheShape(LAYERS, 1, 1, case.kv_heads, case.head_dim, case.dtype, device)
    for name, kernel in KERNELS.items():
        size = max(DEFAULT_BLOCK_SIZE, kernel.block_multiple)
        sized = replace(shape, block_size=size, num_blocks=case.batch * -(-case.context // size))
        if kernel is not ReferenceKernel and kernel.unsupported(sized) is None:
            yield name, kernel_step(case, kernel(sized))
    yield "sdpa, no gather", sdpa_step(case, device)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for case in CASES:
        print(case)
        for name, step in candidates(case, args.device):
            print(f"  {name:18} {milliseconds(step, args.device, args.seconds) / LAYERS:8.3f} ms per layer")


if __name__ == "__main__":
    main()
