"""Decode steps as CUDA graphs: one launch in place of hundreds, which a CPU starts more slowly than a GPU ends them.

A graph computes on the memory on which it was captured. So what a step depends on is copied into buffers that stay in
place, and everything after that is a function of them (`DecodeGraphs.compute`): shapes depend on the number of rows
alone, and the CPU reads nothing of what the device computes. There is a graph for some numbers of rows. A step takes
the next one, and the rows that are left over are padding: token 0 at position 0 of a block that belongs to no request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Items

import numpy as np
import torch
from transformers import PretrainedConfig

from engine.attention.kernel import AttentionKernel, PackedStep, StaticKernel, StaticStep
from engine.commands import ChunkInput
from engine.config import EngineConfig
from engine.families.base import FamilyModel
from engine.memory import GRAPHS_RESERVE

logger = logging.getLogger(__name__)


def has_graphs(config: EngineConfig, model: FamilyModel, kernel: type[AttentionKernel], device: torch.device) -> bool:
    """Tell whether decode steps become graphs; if not for the model's or the kernel's sake, the log says so."""
    if device.type != "cuda" or config.enforce_eager:
        return False
    reasons = {
        "tensor-parallel ranks run without them": config.tensor_parallel_degree > 1,
        f"the attention kernel {kernel.name} runs without them": not kernel.capturable,
        f"the attention kernel {kernel.name} runs layers with windows or score caps without them": (
            not kernel.capturable_windows and (model.special_attention or _has_windows(model.text_config))
        ),
        "the model's rotary frequencies depend on the length of the step": not model.capturable,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is not None:
        logger.info("no CUDA graphs: %s", reason)
    return reason is None


def _has_windows(text: PretrainedConfig) -> bool:
    kinds = getattr(text, "layer_types", None)
    return bool(getattr(text, "sliding_window", None)) and (kinds is None or "sliding_attention" in kinds)


def batch_sizes(most: int) -> list[int]:
    """Return the numbers of rows that get a graph, ascending: 1, 2, 4, the multiples of 8, and `most`."""
    return sorted({size for size in (1, 2, 4, *range(8, most, 8)) if size < most} | {most})


class DecodeGraphs:
    """Runs steps in which every sequence has one token.

    Attributes:
        sizes: Numbers of rows that get a graph, ascending.
        replays: Number of rows -> function that computes that many rows of the buffers. Longer steps run eagerly.
    """

    def __init__(self, model: FamilyModel, kernel: StaticKernel, *, max_num_seqs: int, max_model_len: int) -> None:
        """Create the buffers.

        Args:
            model: The model.
            kernel: Its attention; the last block of the cache belongs to the padding.
            max_num_seqs: Greatest number of rows.
            max_model_len: Greatest number of tokens of a sequence.
        """
        shape = kernel.shape
        self._model, self._kernel, self._scratch = model, kernel, shape.num_blocks - 1
        self.sizes = batch_sizes(max_num_seqs)
        self.replays: dict[int, Callable[[], None]] = {}
        numbers, width = 4 + model.position_axes, -(-max_model_len // shape.block_size)
        pinned = shape.device.type == "cuda"
        self._host_numbers = torch.zeros((numbers, max_num_seqs), dtype=torch.int64, pin_memory=pinned)
        self._host_tables = torch.zeros((max_num_seqs, width), dtype=torch.int32, pin_memory=pinned)
        self._numbers = torch.zeros_like(self._host_numbers, device=shape.device)
        self._tables = torch.zeros_like(self._host_tables, device=shape.device)
        size = (max_num_seqs, int(model.text_config.hidden_size))
        self._hidden = torch.zeros(size, dtype=shape.dtype, device=shape.device)

    def take(self, chunks: Items[ChunkInput]) -> bool:
        """Tell whether there is a graph for these chunks.

        Those that need an image's encoder output are run eagerly, and those whose hidden states the caller keeps.
        """
        if len(chunks) > max(self.replays, default=0):
            return False
        return all(len(c.token_ids) == 1 and not c.images and not c.prompt_logits for c in chunks)

    def run(
        self, chunks: Items[ChunkInput], step: PackedStep, token_ids: np.ndarray, positions: np.ndarray
    ) -> torch.Tensor:
        """Compute chunks that it takes.

        Args:
            chunks: The chunks.
            step: The same, packed; its slots are on the host.
            token_ids: [chunks].
            positions: [position_axes, chunks].

        Returns:
            Hidden states [chunks, D], until the next call.
        """
        count = len(chunks)
        rows = min(size for size in self.replays if size >= count)
        self._pad(count, rows)
        numbers, tables = self._host_numbers.numpy(), self._host_tables.numpy()
        numbers[0, :count], numbers[1, :count], numbers[2, :count] = token_ids, step.slots, step.context_lens
        numbers[3, :count] = [chunk.is_long for chunk in chunks]
        numbers[4:, :count] = positions
        for row, (table, context) in enumerate(zip(step.block_tables, step.context_lens, strict=True)):
            used = -(-context // step.block_size)
            tables[row, :used] = table[:used]
            # A kernel that reads and hides what is behind must find no NaN.
            tables[row, used:] = table[used - 1]
        self._send(rows)
        self.replays[rows]()
        return self._hidden[:count]

    def compute(self, numbers: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        """Compute a step from its buffers alone, which are all on the device.

        Args:
            numbers: [4 + position_axes, rows]: token ids, slots, context lengths, whether the sequence is long (see
                `LongRope`), and positions.
            tables: [rows, blocks of the longest sequence], int32.

        Returns:
            Hidden states [rows, D].
        """
        token_ids, slots, context_lens, is_long = numbers[:4]
        positions = numbers[4:] if len(numbers) > 5 else numbers[4]
        if self._model.long_rope is not None:
            self._model.long_rope.is_long = is_long
        self._kernel.begin_static(StaticStep(slots, context_lens.int(), tables))
        return self._model.forward(self._model.embed(token_ids), positions, kernel=self._kernel, tokens=len(token_ids))

    def compute_rows(self, rows: int) -> None:
        """Compute this many rows of the buffers."""
        self._hidden[:rows] = self.compute(self._numbers[:, :rows], self._tables[:rows])

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the graphs, the largest first, because the others then fit into its memory.

        It ends when `GRAPHS_RESERVE` is used up: smaller steps then take a larger graph. If it fails, all steps run
        eagerly. The model must have run before, so that nothing is compiled here.
        """
        device = self._kernel.shape.device
        began, free = time.perf_counter(), torch.cuda.mem_get_info(device)[0]
        taken = 0
        try:
            with torch.cuda.device(device):
                pool = torch.cuda.graph_pool_handle()
                for rows in reversed(self.sizes):
                    self._pad(0, rows)
                    self._send(rows)
                    self.compute_rows(rows)
                    torch.cuda.synchronize()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool):
                        self.compute_rows(rows)
                    self.replays[rows] = graph.replay
                    taken = free - torch.cuda.mem_get_info(device)[0]
                    if taken > GRAPHS_RESERVE:
                        break
        except Exception:  # an operation that cannot be captured may raise any error
            self.replays.clear()
            logger.warning(
                "CUDA graphs cannot be captured, so steps run without them; option.enforce_eager=true does not try",
                exc_info=True,
            )
            return
        logger.info(
            "CUDA graphs for %d to %d sequences a step: %d MiB, %.1f s",
            min(self.replays), max(self.replays), taken >> 20, time.perf_counter() - began,
        )  # fmt: skip

    def _pad(self, first: int, rows: int) -> None:
        numbers = self._host_numbers.numpy()[:, first:rows]
        numbers[:] = 0
        numbers[1:3] = [[self._scratch * self._kernel.shape.block_size], [1]]
        self._host_tables.numpy()[first:rows] = self._scratch

    def _send(self, rows: int) -> None:
        self._numbers.copy_(self._host_numbers, non_blocking=True)
        self._tables[:rows].copy_(self._host_tables[:rows], non_blocking=True)
