"""Decode steps on static buffers, which CUDA graphs replay: what a CPU can show of them, for every family."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine.decode_graphs
from engine.attention.cpu import CpuKernel
from engine.attention.gather import GatherKernel
from engine.attention.kernel import CacheShape
from engine.attention.varlen import VarlenKernel
from engine.attention.xformers_paged import XformersKernel
from engine.config import EngineConfig
from engine.decode_graphs import DecodeGraphs, batch_sizes, has_graphs
from engine.engine import Engine
from engine.loader import load_preprocessor
from engine.memory import GRAPHS_RESERVE, cache_blocks
from engine.sampling_params import SamplingParams
from tests.support.decode_graphs import adds, loaded, run, watch
from tests.support.engine_driver import Prompt, load_engine, run_all
from tests.support.exactness import small_images
from tests.support.families import MAKERS
from tests.support.models import make_llava, make_text_model

LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0 + 0.1 * pair for pair in range(8)],
    "long_factor": [2.0 + pair for pair in range(8)],
}
MODELS: dict[str, Callable[[Path], Path]] = {
    **MAKERS,
    "mistral-window": lambda path: make_text_model(path, "mistral"),
    "phi3-long": lambda path: make_text_model(path, "phi3", original_max_position_embeddings=48, rope_parameters=LONG),
    "gemma2": lambda path: make_text_model(path, "gemma2"),
    "qwen3": lambda path: make_text_model(path, "qwen3"),
}
SMALL = {"max_model_len": 240, "block_size": 8}
META = torch.device("meta")

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and none is here")


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param](tmp_path_factory.mktemp("models") / request.param)


def graphs_of(made: Engine) -> DecodeGraphs:
    assert made.runner.graphs is not None
    return made.runner.graphs


def block_bytes(path: Path) -> int:
    return load_engine(path, max_num_seqs=1, **SMALL).runner.kernel.shape.bytes_per_block


@pytest.mark.parametrize("tight", [False, True])
def test_tokens_equal_those_of_eager_steps(path: Path, tight: bool) -> None:
    """In float32, while requests come, end, are aborted and, with a tight cache, preempted."""
    preprocessor = load_preprocessor(str(path))
    images = small_images() if preprocessor is not None else []
    cache = block_bytes(path) * (33 if tight else 400)
    eager = loaded(path, static=False, max_num_seqs=11, kv_cache_bytes=cache, **SMALL)
    static = loaded(path, static=True, max_num_seqs=11, kv_cache_bytes=cache, **SMALL)
    rows = watch(graphs_of(static))
    for shown in (images, []) if static.runner.model.attends_images else (images,):
        loads = [adds(preprocessor, shown, seed=tight) for _ in range(2)]
        want, got = (
            run(made, load, tight, 2 if tight else 12) for made, load in zip((eager, static), loads, strict=True)
        )
        assert got == want
    assert len(rows) > 20
    if tight:  # a request that is computed again when it grows long leaves its blocks to others
        assert static.stats().preemptions or static.runner.model.long_rope is not None
    else:
        assert max(rows) == 11


def record(graphs: DecodeGraphs) -> dict[int, torch.fx.GraphModule]:
    """Replace the function of the buffers by the operations that it was seen to run when they held padding."""
    modules = {}
    for rows in graphs.sizes:
        with torch.no_grad():
            trace = make_fx(lambda numbers, tables: graphs.compute(numbers, tables))
            modules[rows] = trace(graphs._numbers[:, :rows].clone(), graphs._tables[:rows].clone())

    def replay(rows: int) -> None:
        graphs._hidden[:rows] = modules[rows](graphs._numbers[:, :rows], graphs._tables[:rows])

    graphs.replays = {rows: partial(replay, rows) for rows in graphs.sizes}
    return modules


def test_recorded_steps_give_the_tokens_of_other_steps(path: Path) -> None:
    """Recording fails where Python reads a value, and what depended on the recorded step would be wrong later."""
    preprocessor = load_preprocessor(str(path))
    images = small_images() if preprocessor is not None else []
    static = loaded(path, static=True, max_num_seqs=4, **SMALL)
    graphs = graphs_of(static)
    if static.runner.model.attends_images:
        images = []
    modules = record(graphs)
    rows = watch(graphs)
    eager = loaded(path, static=False, max_num_seqs=4, **SMALL)
    want, got = (run(made, adds(preprocessor, images, 3, 6), 3) for made in (eager, static))
    assert got == want
    assert len(rows) > 10
    for module in modules.values():
        operations = {node.target for node in module.graph.nodes if node.op == "call_function"}
        assert len(operations) > 10
        for operation in operations:
            tags = getattr(operation, "tags", ())
            assert torch.Tag.dynamic_output_shape not in tags, operation
            assert torch.Tag.data_dependent_output not in tags, operation


class OnDeviceAlone(TorchDispatchMode):
    """Fails for an operation with a tensor on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            assert not isinstance(tensor, torch.Tensor) or tensor.device == META, func
        return out


@pytest.mark.parametrize("kind", [GatherKernel, VarlenKernel])
def test_a_step_takes_nothing_from_the_cpu_and_gives_it_nothing(path: Path, kind: type) -> None:
    """Tensors without contents: an operation that reads a value, or a tensor that lies elsewhere, fails."""
    static = loaded(path, static=True, max_num_seqs=4, dtype="bfloat16", **SMALL)
    model, shape = static.runner.model, static.runner.kernel.shape
    if model.special_attention and not kind.special:
        pytest.skip("this kernel is not chosen for such models")
    fake = FakeTensorMode()
    for module in model.model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = FakeTensor(fake, tensor.detach().to(META), META)
    sized = CacheShape(shape.num_layers, 8, 256, shape.kv_heads, shape.head_dim, shape.dtype, META, shape.special)
    with fake, torch.no_grad():
        graphs = DecodeGraphs(model, kind(sized), max_num_seqs=4, max_model_len=512)
        with OnDeviceAlone():
            graphs.compute_rows(2)


def test_the_numbers_of_rows() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(6) == [1, 2, 4, 6]
    assert batch_sizes(8) == [1, 2, 4, 8]
    assert batch_sizes(30) == [1, 2, 4, 8, 16, 24, 30]


def test_who_has_no_graphs_is_told_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "engine.decode_graphs")
    plain = loaded(make_llava(tmp_path / "llava"), static=False, **SMALL).runner.model
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    path = make_text_model(tmp_path / "text", "llama", rope_parameters=rope)
    dynamic = loaded(path, static=False, **SMALL).runner.model
    path = make_text_model(tmp_path / "windows", "mistral")
    windows = loaded(path, static=False, **SMALL).runner.model
    one, two = (EngineConfig(model_path="", devices=names) for names in (("cuda:0",), ("cuda:0", "cuda:1")))
    eager = EngineConfig(model_path="", devices=("cuda:0",), enforce_eager=True)
    cuda = torch.device("cuda:0")
    assert has_graphs(one, plain, VarlenKernel, cuda)
    assert has_graphs(one, windows, VarlenKernel, cuda)
    assert has_graphs(one, plain, XformersKernel, cuda)
    assert not has_graphs(one, plain, CpuKernel, torch.device("cpu"))
    assert not has_graphs(eager, plain, VarlenKernel, cuda)
    assert caplog.messages == []
    assert not has_graphs(two, plain, VarlenKernel, cuda)
    assert not has_graphs(one, plain, GatherKernel, cuda)
    assert not has_graphs(one, windows, XformersKernel, cuda)
    assert not has_graphs(one, dynamic, VarlenKernel, cuda)
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "tensor-parallel ranks run without them",
        "the attention kernel torch runs without them",
        "the attention kernel xformers runs layers with windows or score caps without them",
        "the model's rotary frequencies depend on the length of the step",
    ]


def test_the_padding_has_a_block_of_its_own(tmp_path: Path) -> None:
    made = loaded(make_llava(tmp_path / "llava"), static=True, max_num_seqs=3, **SMALL)
    runner = made.runner
    assert runner.kernel.shape.num_blocks == runner.num_blocks + 1 == made.pool.num_blocks + 1
    shape, text = runner.kernel.shape, runner.model.text_config
    config = EngineConfig(model_path="", kv_cache_bytes=shape.bytes_per_block * 10, max_model_len=40)
    assert [cache_blocks(config, shape, text, graphs=graphs)[1] for graphs in (False, True)] == [10, 9]


class Cuda:
    """Stands in for torch.cuda: graphs run what was captured, and each takes some memory."""

    def __init__(self, graphs: DecodeGraphs, taken: int, fails_at: int | None = None) -> None:
        self.free, self.taken, self.captured = 1 << 40, taken, list[int]()
        compute = graphs.compute_rows
        self.capturing = False

        def noting(rows: int) -> None:
            if self.capturing:
                self.captured.append(rows)
                if rows == fails_at:
                    raise RuntimeError("operation not permitted when stream is capturing")
            compute(rows)

        graphs.compute_rows = noting  # type: ignore[method-assign]

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.free, 1 << 40

    def graph_pool_handle(self) -> str:
        return "pool"

    def synchronize(self) -> None:
        pass

    def CUDAGraph(self) -> Any:
        class Graph:
            def replay(self) -> None:
                pass

        return Graph()

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def graph(self, graph: Any, pool: str) -> Iterator[None]:
        assert pool == "pool"
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False
        self.free -= self.taken


@pytest.mark.parametrize(
    ("taken", "fails_at", "captured", "said"),
    [
        (1 << 20, None, [6, 4, 2, 1], "CUDA graphs for 1 to 6 sequences a step: 4 MiB"),
        (GRAPHS_RESERVE // 2 + 1, None, [6, 4], "CUDA graphs for 4 to 6 sequences a step: 1024 MiB"),
        (1 << 20, 2, [], "option.enforce_eager=true does not try"),
    ],
)
def test_capturing(
    taken: int,
    fails_at: int | None,
    captured: list[int],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The order, the end of the memory, and a failure, with a stand-in for torch.cuda."""
    caplog.set_level(logging.INFO, "engine.decode_graphs")
    made = loaded(make_llava(tmp_path / "llava"), static=True, max_num_seqs=6, **SMALL)
    graphs = graphs_of(made)
    graphs.replays = {}
    cuda = Cuda(graphs, taken, fails_at)
    with monkeypatch.context() as patch:
        patch.setattr(engine.decode_graphs.torch, "cuda", cuda)
        made.warm_up()
    assert list(graphs.replays) == captured
    assert said in caplog.text
    if fails_at is not None:
        params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
        (result,) = run_all(made, [Prompt([65, 66]).add(None, params)]).values()
        assert len(result.token_ids) == 3


@on_cuda
@pytest.mark.parametrize("attention", ["varlen", "xformers"])
def test_graphs_on_cuda_compute_what_eager_steps_do(tmp_path: Path, attention: str) -> None:
    path = make_llava(tmp_path / "llava")
    settings = {"devices": ("cuda:0",), "dtype": "bfloat16", "attention": attention, "max_num_seqs": 11}
    made = load_engine(path, kv_cache_bytes=1 << 28, **settings)
    made.warm_up()
    graphs = graphs_of(made)
    assert list(graphs.replays) == [11, 8, 4, 2, 1]
    wrong: list[int] = []
    replays = graphs.replays

    def both(rows: int) -> None:
        replays[rows]()
        replayed = graphs._hidden[:rows].clone()
        graphs.compute_rows(rows)
        if not torch.equal(replayed, graphs._hidden[:rows]):
            wrong.append(rows)

    graphs.replays = {rows: partial(both, rows) for rows in replays}
    run(made, adds(load_preprocessor(str(path)), small_images(), seed=0), 0)
    assert wrong == []
