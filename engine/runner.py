"""Runs one step on the device: packs the chunks into one row, runs the model once, and picks the requested rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, pairwise

import numpy as np
import torch
import torch.nn.functional as F

from engine.attention.kernel import CacheShape, PackedStep, StaticKernel
from engine.attention.select import choose_kernel
from engine.commands import ChunkInput, Command, Encode, Run, Scrub, Trim
from engine.config import EngineConfig
from engine.decode_graphs import DecodeGraphs, has_graphs
from engine.encoder_cache import EncoderCache
from engine.families.base import AttendedChunk, FamilyModel
from engine.memory import cache_blocks, encoder_budget
from engine.messages import EMBEDDINGS, ImageInput
from engine.packed_linear import PackedLinear, most_cheap_rows
from engine.threads import StepThreads

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class StepLogits:
    """Result of a step.

    Attributes:
        samples: [rows, V]: the rows that each chunk asks for, in the order of the chunks.
        prompts: Hidden states [chunk length, D] of each chunk that needs the log probabilities of its prompt.
            All of its logits at once could take gigabytes.
    """

    samples: torch.Tensor
    prompts: dict[int, torch.Tensor]


class ModelRunner:
    """Holds the model, the paged cache and the encoder cache of one rank.

    Attributes:
        threads: How many threads compute a step.
        num_blocks: Number of blocks that requests may use.
        graphs: Runs decode steps, where they are CUDA graphs.
    """

    def __init__(self, config: EngineConfig, model: FamilyModel, device: torch.device) -> None:
        text, layout = model.text_config, model.cache_layout(model.model.config)
        self.model = model
        self.device = device
        self.dtype: torch.dtype = model.model.dtype
        self.vocab_size = int(text.vocab_size)
        shape = CacheShape(
            num_layers=layout.num_layers,
            num_blocks=1,
            block_size=1,
            kv_heads=layout.kv_heads // config.tensor_parallel_degree,
            head_dim=layout.head_dim,
            dtype=self.dtype,
            device=device,
            special=model.special_attention,
        )
        kernel, shape = choose_kernel(
            config.attention, shape, config.block_size, query_heads=layout.query_heads // config.tensor_parallel_degree
        )
        self.block_size = shape.block_size
        image_bytes = layout.image_values // config.tensor_parallel_degree * self.dtype.itemsize
        graphs = has_graphs(config, model, kernel, device)
        images = encoder_budget(config, device, image_bytes, graphs=graphs)
        self.image_slots = images // image_bytes if image_bytes else None
        if image_bytes:
            logger.info(
                "memory for %d images of running requests, %.1f MiB each", self.image_slots, image_bytes / 2**20
            )
        self.encoder_cache = EncoderCache(images)
        self.threads = StepThreads(1)
        self._cheap_rows = most_cheap_rows(model.decoder, model.head)
        self.max_model_len, self.num_blocks = cache_blocks(config, shape, text, image_bytes, graphs=graphs)
        self.kernel = kernel(replace(shape, num_blocks=self.num_blocks + graphs))
        self.graphs: DecodeGraphs | None = None
        if graphs:
            assert isinstance(self.kernel, StaticKernel)
            self.graphs = DecodeGraphs(
                model, self.kernel, max_num_seqs=config.max_num_seqs, max_model_len=self.max_model_len
            )

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of this rank's weights as they are computed with; asked for whenever the cores are shared anew."""
        packed = (m.weight_bytes for m in self.model.model.modules() if isinstance(m, PackedLinear))
        return sum(packed, sum(p.nbytes for p in self.model.model.parameters()))

    def execute(self, command: Command) -> StepLogits | None:
        """Execute a command, which every rank gets. Only `Run` has a result."""
        match command:
            case Run():
                return self.run(command.chunks)
            case Encode():
                self.encode(command.images)
            case Trim():
                self.encoder_cache.trim(command.keep)
            case Scrub():
                self.kernel.scrub(command.blocks)
        return None

    @torch.inference_mode()
    def encode(self, images: Items[ImageInput]) -> None:
        """Run the vision encoder and keep its outputs; embeddings sent by the client are kept as they are.

        The images must differ in digest and must not be cached.
        """
        self.threads.use_all()
        raw: list[ImageInput] = []
        for image in images:
            if EMBEDDINGS in image.tensors:
                self.encoder_cache.put(image.digest, self._on_device(image)[EMBEDDINGS].to(self.dtype))
            else:
                raw.append(image)
        batch = self.model.encode_batch
        for start in range(0, len(raw), batch):
            some = raw[start : start + batch]
            for image, features in zip(some, self.model.encode([self._on_device(i) for i in some]), strict=True):
                # A copy, so that keeping one image's output does not keep the whole batch.
                self.encoder_cache.put(image.digest, features.clone())

    def _on_device(self, image: ImageInput) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(data.unpack()).to(self.device) for name, data in image.tensors.items()}

    @torch.inference_mode()
    def run(self, chunks: Items[ChunkInput]) -> StepLogits:
        """Compute the chunks' keys and values, and the logits of those that sample or need prompt log probabilities."""
        with self.threads.step(sum(chunk.length for chunk in chunks)):
            return self._run(chunks)

    def _run(self, chunks: Items[ChunkInput]) -> StepLogits:
        order = sorted(range(len(chunks)), key=lambda i: chunks[i].length != 1)
        ordered = [chunks[i] for i in order]
        step, token_ids, positions = self._pack(ordered)
        samples: list[int] = []
        prompts: dict[int, range] = {}
        for index, place in sorted(zip(order, range(len(order)), strict=True)):
            chunk, start = chunks[index], step.query_starts[place]
            samples += range(start + chunk.length - chunk.samples, start + chunk.length)
            if chunk.prompt_logits:
                prompts[index] = range(start, start + chunk.length)
        padded = samples + samples[:1] * self._padding(len(samples))
        spans = list(accumulate(map(len, prompts.values()), initial=len(padded)))
        wanted = [*padded, *chain.from_iterable(prompts.values())]
        wanted += wanted[:1] * self._padding(len(wanted))
        rows = torch.tensor(wanted, dtype=torch.long, device=self.device)
        if self.graphs is not None and self.graphs.take(ordered):
            hidden = self.graphs.run(ordered, step, token_ids, positions)[rows]
        else:
            hidden = self._forward(ordered, step, token_ids, positions, rows)
        return StepLogits(
            samples=self.model.logits(hidden[: len(padded)])[: len(samples)],
            prompts={index: hidden[start:stop] for index, (start, stop) in zip(prompts, pairwise(spans), strict=True)},
        )

    def _forward(
        self,
        chunks: Items[ChunkInput],
        step: PackedStep,
        token_ids: np.ndarray,
        positions: np.ndarray,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Return the last hidden states [len(rows), D] of some rows of the packed chunks."""
        step.slots = step.slots.to(self.device)
        embeddings = self.model.embed(torch.from_numpy(token_ids).to(self.device))
        attended: list[AttendedChunk] = []
        beyond: list[tuple[torch.Tensor, torch.Tensor]] = []
        for chunk, start in zip(chunks, step.query_starts, strict=False):
            if not self.model.attends_images:
                beyond += self._merge_images(embeddings, chunk, start)
            elif chunk.images:
                features = [self.encoder_cache[image.digest] for image in chunk.images]
                attended.append(AttendedChunk(start, chunk.start, chunk.stop, chunk.images, features))
        self.kernel.begin(step)
        padding = self._padding(step.num_tokens)
        if self.model.long_rope is not None:
            is_long = np.repeat([chunk.is_long for chunk in chunks], [chunk.length for chunk in chunks])
            self.model.long_rope.is_long = torch.from_numpy(np.pad(is_long, (0, padding))).to(self.device)
        if padding:
            embeddings = F.pad(embeddings, (0, 0, 0, padding))
            positions = np.pad(positions, ((0, 0), (0, padding)))
        return self.model.last_hidden(
            embeddings,
            torch.from_numpy(positions if len(positions) > 1 else positions[0]).to(self.device),
            rows,
            kernel=self.kernel,
            tokens=step.num_tokens,
            **({"attended": attended} if attended else {}),
            **({"beyond": tuple(torch.cat(parts) for parts in zip(*beyond, strict=True))} if beyond else {}),
        )

    def _padding(self, rows: int) -> int:
        """How many rows to add, so that few different numbers of rows occur (see `most_cheap_rows`)."""
        if self.device.type != "cpu" or self.dtype == torch.float32 or rows <= self._cheap_rows:
            return 0
        unit = 8 if rows <= 128 else 32 if rows <= 256 else 64
        return -rows % unit

    def _pack(self, chunks: Items[ChunkInput]) -> tuple[PackedStep, np.ndarray, np.ndarray]:
        """Pack the chunks on the host. Chunks of one token come first.

        Most steps have no others, and are filled without a loop over numpy calls.
        """
        size = self.block_size
        lengths = [chunk.length for chunk in chunks]
        starts = [0, *accumulate(lengths)]
        token_ids, slots = (np.empty(starts[-1], dtype=np.int64) for _ in range(2))
        positions = np.empty((self.model.position_axes, starts[-1]), dtype=np.int64)
        singles = chunks[: lengths.count(1)]
        num_decodes = len(singles)
        token_ids[:num_decodes] = [chunk.token_ids[0] for chunk in singles]
        positions[:, :num_decodes] = [chunk.start + chunk.position_delta for chunk in singles]
        slots[:num_decodes] = [chunk.block_table[chunk.start // size] * size + chunk.start % size for chunk in singles]
        for chunk, at in zip(chunks[num_decodes:], starts[num_decodes:], strict=False):
            span = slice(at, at + chunk.length)
            place = np.arange(chunk.start, chunk.stop)
            token_ids[span] = chunk.token_ids
            positions[:, span] = place + chunk.position_delta
            slots[span] = np.asarray(chunk.block_table)[place // size] * size + place % size
        for chunk, at in zip(chunks, starts, strict=False):
            if chunk.positions is not None:
                positions[:, at : at + chunk.length] = chunk.positions.unpack()
        step = PackedStep(
            query_starts=starts,
            context_lens=[chunk.stop for chunk in chunks],
            block_tables=[chunk.block_table for chunk in chunks],
            slots=torch.from_numpy(slots),
            num_decodes=num_decodes,
            block_size=size,
            spans=[chunk.spans for chunk in chunks] if any(chunk.spans for chunk in chunks) else (),
            spans_pass_windows=self.model.spans_pass_windows,
        )
        return step, token_ids, positions

    def _merge_images(
        self, embeddings: torch.Tensor, chunk: ChunkInput, at: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Overwrite the rows of image tokens; the chunk's first row is row `at` of `embeddings`.

        Returns:
            For families whose rows are longer than an embedding, the indices of the rows and what lies beyond
                the embedding.
        """
        beyond = []
        width = embeddings.shape[1]
        for image in chunk.images:
            first, last = max(chunk.start, image.offset), min(chunk.stop, image.end)
            features = self.encoder_cache[image.digest]
            rows = torch.arange(at + first - chunk.start, at + last - chunk.start, device=self.device)
            before = first - image.offset
            if image.is_embed is not None:
                mask = torch.tensor(image.is_embed[before : last - image.offset], device=self.device)
                rows, before = rows[mask], sum(image.is_embed[:before])
            part = features[before : before + len(rows)].to(embeddings.dtype)
            embeddings[rows] = part[:, :width]
            if features.shape[1] > width:
                beyond.append((rows, part[:, width:]))
        return beyond
