"""Every attention kernel answers as the formula does, whatever the step looks like and wherever the blocks lie.

Kernels that want a GPU are held to the same property here as far as a CPU goes: xformers' Triton kernel runs in
Triton's interpreter, and `varlen_attn`, which has no CPU form, is replaced by its documented contract in plain
torch. `torch.cuda` machines run all of them as they are.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine.attention.varlen
from engine.attention import gather
from engine.attention.cpu import CpuKernel
from engine.attention.gather import GatherKernel, cap_scores
from engine.attention.kernel import AttentionKernel, CacheShape, PackedStep, StaticStep
from engine.attention.reference import ReferenceKernel
from engine.attention.select import AUTO, choose_kernel, trial
from engine.attention.varlen import VarlenKernel
from engine.attention.xformers_paged import XformersKernel
from engine.errors import ModelLoadError
from engine.native import library
from engine.sampling_params import SamplingParams
from tests.support.engine_driver import Prompt, load_engine, run_all
from tests.support.models import make_llava

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GARBAGE = 1000.0
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Inputs have unit variance; 16-bit types round the scores (of size up to 5 or so) to 3 or 2 decimals."""

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and none is here")


class Traffic:
    """Sequences that grow step by step in one paged cache, in chunks of random length, most of them decoding."""

    def __init__(
        self, shape: CacheShape, heads: int, seed: int, *, sequences: int, longest: int, spans: bool = False
    ) -> None:
        """spans: runs of some sequences are seen both ways, and are not cut by chunks."""
        self.shape, self.heads = shape, heads
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        blocks = list(range(shape.num_blocks - 1))  # the last one is for padding
        self.random.shuffle(blocks)
        width = -(-longest // shape.block_size)
        assert sequences * width <= len(blocks)
        self.tables = [blocks[i * width : (i + 1) * width] for i in range(sequences)]
        self.targets = [self.random.randint(1, longest) for _ in range(sequences)]
        self.lengths = [0] * sequences
        self.spans = [self._spans(target) if spans else [] for target in self.targets]
        self.pass_windows = spans and self.random.random() < 0.5

    def _spans(self, target: int) -> list[tuple[int, int]]:
        edges = sorted(self.random.sample(range(target + 1), min(target + 1, self.random.choice([0, 2, 4]))))
        return list(zip(edges[::2], edges[1::2], strict=False))

    def tokens(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = (
            torch.randn(count, heads, self.shape.head_dim, generator=self.generator)
            for heads in (self.heads, self.shape.kv_heads, self.shape.kv_heads)
        )
        query, key, value = (t.to(self.shape.device, self.shape.dtype) for t in (query, key, value))
        return query, key, value

    def next_step(self) -> PackedStep | None:
        """Some of the sequences advance: by a chunk, or by one token once a prompt is in."""
        chosen = []
        for index, (length, target) in enumerate(zip(self.lengths, self.targets, strict=True)):
            room = target - length
            if room and self.random.random() < 0.8:
                whole = length == 0 and self.random.random() < 0.5
                chunk = room if whole else self.random.choice([1, 1, self.random.randint(1, room)])
                chunk = next((b - length for a, b in self.spans[index] if a < length + chunk < b), chunk)
                chosen.append((index, chunk))
        if not chosen:
            return None
        chosen.sort(key=lambda pair: pair[1] != 1)
        parts = []
        for index, chunk in chosen:
            parts.append((self.tables[index], self.lengths[index], chunk))
            self.lengths[index] += chunk
        step = packed(self.shape, parts)
        step.spans = [self.spans[index] for index, _ in chosen]
        step.spans_pass_windows = self.pass_windows
        return step


def packed(shape: CacheShape, parts: list[tuple[list[int], int, int]]) -> PackedStep:
    """parts: (block table, tokens already in the cache, new tokens) of each sequence, decodes first."""
    size = shape.block_size
    starts, slots = [0], []
    for table, computed, new in parts:
        starts.append(starts[-1] + new)
        slots += [table[at // size] * size + at % size for at in range(computed, computed + new)]
    return PackedStep(
        query_starts=starts,
        context_lens=[computed + new for _, computed, new in parts],
        block_tables=[table for table, _, _ in parts],
        slots=torch.tensor(slots, device=shape.device),
        num_decodes=sum(new == 1 for _, _, new in parts),
        block_size=size,
    )


def static(shape: CacheShape, step: PackedStep, width: int) -> StaticStep:
    """A step of decodes with three rows of padding, which have the last block."""
    last, rows = shape.num_blocks - 1, step.num_sequences
    tables = torch.tensor([(table + table[-1:] * width)[:width] for table in step.block_tables], dtype=torch.int32)
    contexts = torch.tensor(step.context_lens, dtype=torch.int32)
    return StaticStep(
        slots=torch.cat([step.slots.cpu(), torch.tensor([last * shape.block_size] * 3)]).to(shape.device),
        context_lens=torch.cat([contexts, torch.ones(3, dtype=torch.int32)]).to(shape.device),
        block_tables=torch.nn.functional.pad(tables, (0, 0, 0, 3), value=last).to(shape.device)[: rows + 3],
    )


def litter(kernel: AttentionKernel, heads: int) -> None:
    """Leave large numbers everywhere in the cache, as another request's old keys and values would lie there."""
    shape = kernel.shape
    for layer in range(shape.num_layers):
        for block in range(shape.num_blocks):
            kernel.begin(packed(shape, [([block], 0, shape.block_size)]))
            full = torch.full((shape.block_size, shape.kv_heads, shape.head_dim), GARBAGE)
            full = full.to(shape.device, shape.dtype)
            query = torch.zeros(shape.block_size, heads, shape.head_dim).to(shape.device, shape.dtype)
            kernel.attend(layer, query, full, full, scale=1.0)


def compare(
    kernel: type[AttentionKernel],
    shape: CacheShape,
    heads: int,
    window: int | None,
    seed: int,
    *,
    softcap: float | None = None,
    graphs: bool = False,
    **traffic: int,
) -> None:
    """Run the same traffic through the kernel and the reference, two layers, of which one has the window.

    graphs: every second step of decodes alone is described by tensors alone, with padding.
    """
    candidate, reference = kernel(shape), ReferenceKernel(shape)
    litter(candidate, heads)
    flow = Traffic(shape, heads, seed, **traffic)
    width = max(map(len, flow.tables))
    scale = shape.head_dim**-0.5
    steps = 0
    while (step := flow.next_step()) is not None or flow.lengths != flow.targets:
        if step is None:
            continue
        steps += 1
        padding = 3 if step.num_decodes == step.num_tokens and graphs and steps % 2 else 0
        if padding:
            candidate.begin_static(static(shape, step, width))
        else:
            candidate.begin(step)
        reference.begin(step)
        for layer in range(shape.num_layers):
            query, key, value = flow.tokens(step.num_tokens)
            sliding = window if layer == 0 else None
            padded = (torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, padding)) for rows in (query, key, value))
            got = candidate.attend(layer, *padded, scale=scale, window=sliding, softcap=softcap)
            got = got[: step.num_tokens]
            wanted = reference.attend(layer, query, key, value, scale=scale, window=sliding, softcap=softcap)
            tolerance = TOLERANCE[shape.dtype]
            torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)
    assert steps


@st.composite
def shapes(
    draw: st.DrawFn, *, block_sizes: list[int], head_dims: list[int], dtypes: list[torch.dtype], longest: int
) -> tuple[CacheShape, int, int | None]:
    """(cache, query heads, window)."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    ratio = draw(st.integers(1, 8))
    size = draw(st.sampled_from(block_sizes))
    shape = CacheShape(
        num_layers=2,
        num_blocks=6 * -(-longest // size) + 3,
        block_size=size,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from(head_dims)),
        dtype=draw(st.sampled_from(dtypes)),
        device=CPU,
    )
    window = draw(st.sampled_from([None, 1, 7, 33, longest + 1]))
    return shape, kv_heads * ratio, window


ALL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = st.integers(0, 2**32 - 1)
unhurried = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))


@unhurried
@given(shapes(block_sizes=[1, 4, 16], head_dims=[16, 32, 64, 80, 128], dtypes=ALL_DTYPES, longest=70), SEEDS)
def test_plain_torch_answers_as_the_formula(drawn: tuple[CacheShape, int, int | None], seed: int) -> None:
    shape, heads, window = drawn
    compare(GatherKernel, shape, heads, window, seed, sequences=6, longest=70)
    compare(GatherKernel, shape, heads, window, seed, sequences=6, longest=70, graphs=True)


@settings(unhurried, max_examples=15)
@given(shapes(block_sizes=[16], head_dims=[32, 64], dtypes=ALL_DTYPES, longest=300), SEEDS)
def test_cpu_kernel_answers_as_the_formula_on_long_contexts(
    drawn: tuple[CacheShape, int, int | None], seed: int
) -> None:
    shape, heads, window = drawn
    compare(CpuKernel, shape, heads, window, seed, sequences=5, longest=300)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no compiler")
def test_decodes_are_compiled_where_there_is_a_compiler() -> None:
    assert library.compiled() is not None


@pytest.mark.parametrize(
    ("capability", "spec", "reason"),
    [
        ("DEFAULT", None, "no C compiler"),
        ("DEFAULT", "missing.so", "no AVX2"),
        ("AVX2", "missing.so", "missing.so"),
    ],
)
def test_without_compiled_code_torch_attends_and_the_log_says_why(
    capability: str,
    spec: str | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = None if spec is None else ModuleSpec("engine.native._native", None, origin=spec)
    monkeypatch.setattr(library, "find_spec", lambda name: found)
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    library.compiled.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "engine.native.library"):
            shape = replace(TEXT, num_layers=2, num_blocks=23, block_size=16)
            compare(CpuKernel, shape, 4, 7, 0, sequences=4, longest=70)
    finally:
        library.compiled.cache_clear()
    [record] = caplog.records
    assert reason in record.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_within_its_sequence_and_is_not_lost(dtype: torch.dtype) -> None:
    shape = CacheShape(1, 4, 16, 2, 64, dtype, CPU)
    kernel = CpuKernel(shape)
    query, key, value = (torch.randn(2, 2, 64).to(dtype) for _ in range(3))
    key[1] = float("nan")
    kernel.begin(packed(shape, [([1], 0, 1), ([2], 0, 1)]))
    out = kernel.attend(0, query, key, value, scale=0.125)
    torch.testing.assert_close(out[0], value[0])
    assert out[1].isnan().all()


@unhurried
@given(
    shapes(block_sizes=[1, 4, 16], head_dims=[16, 32], dtypes=ALL_DTYPES, longest=150),
    SEEDS,
    st.sampled_from([None, 1.5, 50.0]),
    st.sampled_from([gather.MASK_ENTRIES, 700]),
)
def test_spans_seen_both_ways_and_capped_scores(
    drawn: tuple[CacheShape, int, int | None], seed: int, softcap: float | None, entries: int
) -> None:
    """entries: the size of a mask; a larger one is made in parts."""
    shape, heads, window = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "MASK_ENTRIES", entries)
        compare(CpuKernel, shape, heads, window, seed, softcap=softcap, sequences=5, longest=150, spans=True)
        compare(CpuKernel, shape, heads, window, seed, softcap=softcap, sequences=5, longest=150, graphs=True)


@pytest.mark.parametrize(("pass_windows", "seen"), [(False, {3, 4, 5, 6}), (True, {2, 3, 4, 5, 6})])
def test_what_a_token_of_a_span_sees(pass_windows: bool, seen: set[int]) -> None:
    """The token at 5 of the span [2, 7), with a window of 3: where the window counts it hides what is too far back."""
    shape = CacheShape(1, 1, 16, 1, 4, torch.float32, CPU)
    step = packed(shape, [([0], 0, 9)])
    step.spans, step.spans_pass_windows = [[(2, 7)]], pass_windows
    hidden = step.hidden(0, 3, CPU)[5]
    assert set((~hidden).nonzero().flatten().tolist()) == seen


def test_varlen_is_not_chosen_for_spans_and_caps() -> None:
    shape = CacheShape(1, 1, 256, 1, 64, torch.bfloat16, torch.device("cuda"), special=True)
    assert "bidirectional spans" in str(AttentionKernel.unsupported.__func__(VarlenKernel, shape))  # type: ignore[attr-defined]
    assert AttentionKernel.unsupported.__func__(GatherKernel, shape) is None  # type: ignore[attr-defined]


def test_float16_scores_stay_finite_where_their_scaled_size_does() -> None:
    shape = CacheShape(1, 4, 16, 1, 128, torch.float16, CPU)
    kernel = GatherKernel(shape)
    value = torch.randn(1, 1, 128).half()
    kernel.begin(packed(shape, [([2], 0, 1)]))
    large = torch.full((1, 1, 128), 30.0).half()  # the product, 115200, is more than float16 holds
    out = kernel.attend(0, large, large, value, scale=128**-0.5)
    torch.testing.assert_close(out, value)


@pytest.mark.parametrize("kernel", [GatherKernel, VarlenKernel, ReferenceKernel])
def test_scrubbed_blocks_hold_no_nan(kernel: type[AttentionKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a failed request left in a block must not reach the block's next owner through the padding."""
    monkeypatch.setattr(engine.attention.varlen, "varlen_attn", contract_of_varlen_attn)
    shape = CacheShape(1, 3, 256, 2, 16, torch.float32, CPU)
    made = kernel(shape)
    nan = torch.full((256, 2, 16), float("nan"))
    made.begin(packed(shape, [([1], 0, 256)]))
    made.attend(0, nan, nan, nan, scale=0.25)
    made.scrub([1])
    query, key, value = (torch.randn(1, 2, 16) for _ in range(3))
    made.begin(packed(shape, [([1], 0, 1)]))
    torch.testing.assert_close(made.attend(0, query, key, value, scale=0.25), value)


def contract_of_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """What torch documents of `varlen_attn` with pages, and what FlashAttention 2 checks before it starts."""
    pages, page_size, kv_heads, _ = key.shape
    count, heads = len(seqused_k), query.shape[1]
    lengths = cu_seq_q.diff().tolist()
    assert page_size % 256 == 0
    assert value.shape == key.shape
    assert query.dtype == key.dtype == value.dtype
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value, block_table))
    assert all(index.dtype == torch.int32 for index in (cu_seq_q, seqused_k, block_table))
    assert all(index.is_contiguous() for index in (cu_seq_q, seqused_k))
    assert cu_seq_k is not None
    assert cu_seq_k.dtype == torch.int32
    assert cu_seq_k.diff().tolist() == seqused_k.tolist()
    assert block_table.shape[0] == count == len(lengths)
    assert (max_q, max_k) == (max(lengths), max(seqused_k.tolist()))
    assert block_table.shape[1] * page_size >= max_k
    assert 0 <= int(block_table.min()) <= int(block_table.max()) < pages
    assert enable_gqa or heads == kv_heads
    left, right = window_size
    out = torch.empty_like(query)
    for i, context in enumerate(seqused_k.tolist()):
        span = slice(int(cu_seq_q[i]), int(cu_seq_q[i + 1]))
        keys, values = (
            cache[block_table[i].long()].flatten(0, 1)[:context].float().repeat_interleave(heads // kv_heads, 1)
            for cache in (key, value)
        )
        scores = torch.einsum("qhd,khd->hqk", query[span].float(), keys) * scale
        distance = torch.arange(context) - torch.arange(context - lengths[i], context)[:, None]
        hidden = torch.zeros(distance.shape, dtype=torch.bool)
        if left >= 0:
            hidden |= distance < -left
        if right >= 0:
            hidden |= distance > right
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[span] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)
    return out


@settings(unhurried, max_examples=20)
@given(shapes(block_sizes=[256], head_dims=[16, 64], dtypes=[torch.bfloat16, torch.float16], longest=300), SEEDS)
def test_varlen_describes_each_step_as_varlen_attn_wants_it(
    drawn: tuple[CacheShape, int, int | None], seed: int
) -> None:
    """`varlen_attn` has no CPU form, so it, and nothing else, is replaced by its documented contract."""
    shape, heads, window = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.attention.varlen, "varlen_attn", contract_of_varlen_attn)
        compare(VarlenKernel, shape, heads, window, seed, sequences=4, longest=300)


@settings(unhurried, max_examples=20)
@given(shapes(block_sizes=[256], head_dims=[16, 64], dtypes=[torch.bfloat16], longest=300), SEEDS)
def test_varlen_describes_steps_of_graphs_as_varlen_attn_wants_them(
    drawn: tuple[CacheShape, int, int | None], seed: int
) -> None:
    """There the greatest context is the longest possible one."""

    def attend(*tensors: torch.Tensor, **named: Any) -> torch.Tensor:
        *others, max_q, max_k = tensors
        longest = max(named["seqused_k"].tolist())
        assert max_k >= longest
        return contract_of_varlen_attn(*others, max_q, longest, **named)

    shape, heads, window = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.attention.varlen, "varlen_attn", attend)
        compare(VarlenKernel, shape, heads, window, seed, sequences=4, longest=300, graphs=True)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        ("cpu", torch.bfloat16, 64, "runs on CUDA only"),
        ("cuda", torch.float32, 64, "not float32"),
    ],
)
def test_varlen_says_why_it_cannot(device: str, dtype: torch.dtype, head_dim: int, reason: str) -> None:
    shape = CacheShape(1, 1, 256, 1, head_dim, dtype, torch.device(device))
    assert reason in str(VarlenKernel.unsupported(shape))


def missing_for_the_interpreter() -> str | None:
    try:
        import triton  # noqa: F401
        import xformers  # noqa: F401
    except ImportError as error:
        return f"needs xformers and a Triton to interpret it ({error})"
    return None


@pytest.mark.timeout(600)
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own run")
def test_xformers_kernel_in_tritons_interpreter() -> None:
    """The real Triton kernel, in a process of its own: TRITON_INTERPRET must be set before Triton is imported."""
    missing = missing_for_the_interpreter()
    if missing is not None:
        pytest.skip(missing)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreted", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_xformers_kernel_in_tritons_interpreter")


@interpreted
@settings(unhurried, max_examples=8)
@given(
    # Two things only a GPU can do: bfloat16, whose dot product the interpreter takes over the raw bits, and
    # heads of 128, for which xformers asks the CUDA device about its age.
    shapes(block_sizes=[64, 128], head_dims=[16, 32, 64, 256], dtypes=[torch.float32, torch.float16], longest=150),
    SEEDS,
)
def test_interpreted_xformers_answers_as_the_formula(drawn: tuple[CacheShape, int, int | None], seed: int) -> None:
    shape, heads, window = drawn
    assert XformersKernel.unsupported(shape) is None
    compare(XformersKernel, shape, heads, window, seed, sequences=3, longest=150)
    compare(XformersKernel, shape, heads, window, seed, sequences=3, longest=150, graphs=True)


@interpreted
def test_interpreted_xformers_passes_its_trial_and_chooses_its_blocks() -> None:
    shape = CacheShape(2, 1, 1, 2, 32, torch.float32, CPU)
    kernel, sized = choose_kernel("xformers", shape, None, query_heads=4)
    assert kernel is XformersKernel
    assert sized.block_size == 64


@pytest.mark.skipif(INTERPRETED, reason="interpreted, it does run on a CPU")
def test_xformers_says_why_it_cannot_run_on_a_cpu() -> None:
    shape = CacheShape(1, 1, 64, 1, 64, torch.float32, CPU)
    assert "runs on CUDA only" in str(XformersKernel.unsupported(shape))


TEXT = CacheShape(4, 1, 1, 2, 32, torch.float32, CPU)


class Failing(GatherKernel):
    name = "failing"

    def begin(self, step: PackedStep) -> None:
        raise RuntimeError("no kernel image is available for execution on the device\nCUDA error")


class Wrong(GatherKernel):
    name = "wrong"

    def _attend_decodes(
        self,
        layer: int,
        query: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        return super()._attend_decodes(layer, query, scale, 1, softcap)


class LargeBlocks(GatherKernel):
    name = "large"
    block_multiple = 64


def test_a_cpu_gets_the_cpu_kernel_and_blocks_of_16() -> None:
    kernel, shape = choose_kernel("auto", TEXT, None, query_heads=4)
    assert (kernel, shape.block_size) == (CpuKernel, 16)


def test_auto_passes_over_kernels_that_fail_or_err_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(AUTO, "cpu", (Failing, Wrong, CpuKernel))
    with caplog.at_level(logging.INFO, "engine.attention.select"):
        kernel, _ = choose_kernel("auto", TEXT, None, query_heads=4)
    assert kernel is CpuKernel
    [record] = caplog.records
    assert "attention kernel: cpu" in record.message
    assert "not failing: it fails here (RuntimeError: no kernel image is available" in record.message
    assert "not wrong: its answers are wrong here" in record.message


def test_a_kernel_chooses_its_blocks_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AUTO, "cpu", (LargeBlocks, CpuKernel))
    kernel, shape = choose_kernel("auto", TEXT, None, query_heads=4)
    assert (kernel, shape.block_size) == (LargeBlocks, 64)
    kernel, shape = choose_kernel("auto", TEXT, 16, query_heads=4)
    assert (kernel, shape.block_size) == (CpuKernel, 16)


def test_a_kernel_asked_for_by_name_that_cannot_run_is_an_error() -> None:
    with pytest.raises(ModelLoadError, match="not varlen: it runs on CUDA only"):
        choose_kernel("varlen", TEXT, None, query_heads=4)
    with pytest.raises(ModelLoadError, match="unknown; known: auto, cpu"):
        choose_kernel("flash", TEXT, None, query_heads=4)


def test_an_engine_answers_the_same_through_any_kernel_and_block_size(tmp_path: Path) -> None:
    path = make_llava(tmp_path / "llava")
    answers = []
    for attention, block_size, blocks_of in [("auto", None, 16), ("torch", 5, 5), ("reference", 64, 64)]:
        engine = load_engine(path, attention=attention, block_size=block_size)
        assert (engine.runner.block_size, engine.pool.block_size) == (blocks_of, blocks_of)
        adds = [Prompt(list(range(3, 3 + length))).add(None, SamplingParams(max_tokens=12)) for length in (2, 30, 70)]
        answers.append([result.token_ids for _, result in sorted(run_all(engine, adds).items())])
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_every_dtype_passes_the_trial(dtype: torch.dtype) -> None:
    shape = replace(TEXT, dtype=dtype, block_size=16)
    assert trial(GatherKernel, shape, query_heads=6) is None


@on_cuda
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [GatherKernel, VarlenKernel, XformersKernel], ids=lambda k: k.name)
def test_kernels_on_cuda_answer_as_the_formula(kernel: type[AttentionKernel], dtype: torch.dtype) -> None:
    size = max(16, kernel.block_multiple)
    for seed, (head_dim, window) in enumerate([(64, None), (128, None), (128, 33), (32, 7)]):
        shape = CacheShape(2, 6 * -(-300 // size), size, 2, head_dim, dtype, torch.device("cuda"))
        reason = kernel.unsupported(shape)
        if reason is not None:
            pytest.skip(f"{kernel.name}: {reason}")
        for graphs in (False, True):
            compare(kernel, shape, 8, window, seed, sequences=5, longest=300, graphs=graphs)


@on_cuda
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_cuda_always_gets_a_kernel(dtype: torch.dtype) -> None:
    shape = replace(TEXT, dtype=dtype, device=torch.device("cuda"))
    kernel, _ = choose_kernel("auto", shape, None, query_heads=4)
    assert dtype != torch.float32 or kernel is GatherKernel


def test_the_faster_score_cap_is_as_close_as_it_says() -> None:
    scores = torch.linspace(-400, 400, 200_001)
    for cap in (3.0, 50.0):
        exact, fast = scores.clone(), scores.clone()
        cap_scores(exact, cap, exact=True)
        cap_scores(fast, cap, exact=False)
        assert (exact - fast).abs().max() < 1e-6 * cap
