"""Our samplers inside vLLM's own: its batch, its sampler, its two interfaces of logits processors, without a server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.sampler import Sampler, best
from engine.sampling_state import SamplingState
from handlers.backends.vllm import compat
from handlers.backends.vllm import processor as processor_rows
from handlers.backends.vllm.sampling import KEY, PROCESSOR, to_vllm, wanted
from handlers.request import RequestSampling
from tests.support.sampling import EOS, KINDS, random_logits
from tests.support.shapes import ROOT

VOCABULARY = 300
MOST = 64
CPU = torch.device("cpu")

FULL: list[dict[str, Any]] = [
    *KINDS,
    {"typical_p": 0.4, "top_p": 0.95},
    {
        "dry_multiplier": 0.8, "repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.7,
        "logit_bias": {3: 4.0, 9: -100.0}, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3,
        "min_tokens": 5, "stop_token_ids": (EOS, 7),
    },
    {"temperature": 0.0, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2, "min_tokens": 4, "stop_token_ids": (5,)},
    {
        "sampler_priority": (6, 7, 8, 5, 4, 3, 2, 1, 0, 9, 10, 11, 12, 13), "tfs": 0.9, "temperature": 1.4,
        "allowed_token_ids": tuple(range(50)),
    },
    {"mirostat_mode": 2, "mirostat_tau": 2.0, "mirostat_eta": 1.0, "temperature": 1.5},
]  # fmt: skip
"""One request each; those that vLLM samples by itself are among them."""


class Request:
    """One answer in both: in vLLM's batch, and alone with our sampler, whose state nothing interrupts."""

    def __init__(self, number: int, params: RequestSampling) -> None:
        params.validate()
        self.params, self.wanted = params, wanted(params)
        self.vllm = to_vllm(compat.load(), params, 1)
        prompt = [number % 7, 3, 9, number % 7]
        seed = 0 if params.greedy else self.vllm.seed
        self.state = SamplingState(params, prompt, [], (), seed or 0)
        self.name = str(number)
        self.prompt = prompt
        self.output: list[int] = []

    def expected(self, logits: torch.Tensor) -> int:
        (token,), _ = Sampler(VOCABULARY, CPU).sample(logits[None], [self.state])
        return token


def requests() -> list[Request]:
    return [
        Request(number, RequestSampling(**{"seed": 11 * number + 1, **FULL[number % len(FULL)]}))
        for number in range(2 * len(FULL))
    ]


class OlderBatch:
    """The older runner's batch and sampler."""

    def __init__(self) -> None:
        from vllm.v1.sample.logits_processor import (
            BUILTIN_LOGITS_PROCESSORS,
            LogitsProcessors,
            _load_logitsprocs_by_fqcns,
        )
        from vllm.v1.sample.sampler import Sampler as VllmSampler
        from vllm.v1.worker.gpu_input_batch import InputBatch

        config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=MOST))
        (ours,) = _load_logitsprocs_by_fqcns([PROCESSOR])
        self.processor = ours(config, CPU, False)
        self.batch = InputBatch(
            max_num_reqs=MOST, max_model_len=256, max_num_batched_tokens=256, device=CPU, vocab_size=VOCABULARY,
            block_sizes=[16], max_num_blocks_per_req=[16], logitsprocs_need_output_token_ids=True,
            logitsprocs=LogitsProcessors(
                [*(kind(config, CPU, False) for kind in BUILTIN_LOGITS_PROCESSORS), self.processor]
            ),
        )  # fmt: skip
        self.sampler = VllmSampler()

    def add(self, request: Request) -> None:
        from vllm.v1.worker.gpu_input_batch import CachedRequestState

        generator = None
        if request.vllm.seed is not None:
            generator = torch.Generator().manual_seed(request.vllm.seed)
        self.batch.add_request(
            CachedRequestState(request.name, request.prompt, [], request.vllm, generator, ([],), 0, request.output)
        )

    def remove(self, request: Request) -> None:
        self.batch.remove_request(request.name)

    def step(self, rows: dict[str, torch.Tensor], swap: tuple[int, int] | None) -> tuple[list[str], Any]:
        """The names in their places, and what the sampler says."""
        self.batch.condense()
        if swap is not None:
            self.batch.swap_states(*swap)
        self.batch.refresh_metadata()
        names = list(self.batch.req_ids)
        logits = torch.stack([rows[name] for name in names])
        return names, self.sampler(logits.clone(), self.batch.sampling_metadata)


@pytest.mark.parametrize("rows_at_a_time", [5, 64])
def test_the_older_runners_batch_gives_our_samplers_tokens(
    rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes, goes, is preempted or changes places; and everyone else's rows are as without us."""
    monkeypatch.setattr(processor_rows, "MOST_LOGITS", rows_at_a_time * VOCABULARY)
    rng = np.random.default_rng(5)
    side, waiting, running = OlderBatch(), requests(), list[Request]()
    seen: set[int] = set()
    for step in range(60):
        for request in [r for r in running if rng.random() < 0.15]:
            running.remove(request)
            side.remove(request)
            if len(request.output) < 25:
                request.output = list(request.output)  # as a resumed one's is
                waiting.append(request)
        while waiting and len(running) < 40:
            request = waiting.pop(int(rng.integers(len(waiting))))
            running.append(request)
            side.add(request)
        if not running:
            break
        by_name = {request.name: request for request in running}
        table = random_logits(len(running), VOCABULARY, seed=step)
        rows = {request.name: row for request, row in zip(running, table, strict=True)}
        swap = (0, len(running) - 1) if step % 3 == 0 and len(running) > 1 else None
        names, said = side.step(rows, swap)
        for name, token in zip(names, said.sampled_token_ids[:, 0].tolist(), strict=True):
            request = by_name[name]
            if request.wanted:
                assert token == request.expected(rows[name]), (step, request.params)
                seen.add(int(name) % len(FULL))
            elif request.params.greedy:
                assert token == int(best(rows[name][None]))
            request.output.append(token)
            request.state.output_token_ids.append(token)
    assert seen == {number for number, kind in enumerate(FULL) if wanted(RequestSampling(**kind))}


def test_log_probabilities_are_the_models_own() -> None:
    request = Request(1, RequestSampling(top_a=0.3, temperature=0.4, logprobs=2, seed=3))
    side = OlderBatch()
    side.add(request)
    row = random_logits(1, VOCABULARY)[0]
    _, said = side.step({"1": row}, None)
    expected = row.log_softmax(-1)
    ids, values = said.logprobs_tensors.logprob_token_ids[0], said.logprobs_tensors.logprobs[0]
    assert ids[1:].tolist() == row.topk(2).indices.tolist()
    torch.testing.assert_close(values, expected[ids.long()])


def test_without_a_request_of_ours_the_logits_are_not_touched() -> None:
    side = OlderBatch()
    side.add(Request(1, RequestSampling(temperature=0.7, top_p=0.9, min_p=0.1, seed=1)))
    side.batch.refresh_metadata()
    logits = random_logits(1, VOCABULARY)
    before = logits.clone()
    assert side.processor.apply(logits) is logits
    assert torch.equal(logits, before)


def test_a_row_without_a_token_stays_as_it_is() -> None:
    side = OlderBatch()
    for number in range(3):
        side.add(Request(number, RequestSampling(top_a=0.5, seed=number)))
    side.batch.refresh_metadata()
    logits = random_logits(3, VOCABULARY)
    logits[1, 4] = torch.nan
    before = logits[1].clone()
    got = side.processor.apply(logits)
    assert torch.equal(got[1], before) or torch.equal(got[1].isnan(), before.isnan())
    assert torch.equal(torch.nan_to_num(got[1]), torch.nan_to_num(before))
    assert got[[0, 2]].isfinite().sum(-1).tolist() == [1, 1]


def test_tokens_that_are_taken_back_are_forgotten() -> None:
    """As vLLM does when a cache that was to be fetched is gone."""
    request = Request(0, RequestSampling(temperature=0.0, no_repeat_ngram_size=2, dry_multiplier=1.0))
    side = OlderBatch()
    side.add(request)
    row = random_logits(1, VOCABULARY)[0]
    for _ in range(6):
        _, said = side.step({"0": row}, None)
        request.output.append(int(said.sampled_token_ids[0, 0]))
    first = list(request.output)
    del request.output[2:]
    for _ in range(4):
        _, said = side.step({"0": row}, None)
        request.output.append(int(said.sampled_token_ids[0, 0]))
    assert request.output == first


def test_few_mirostats_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor_rows, "REMEMBERED", 3)
    rows = processor_rows.SamplerProcessor(None, CPU)
    made = [
        to_vllm(compat.load(), RequestSampling(mirostat_mode=2, mirostat_tau=2.0, mirostat_eta=0.1, seed=seed), 1)
        for seed in range(9)
    ]
    states = [rows.row(params, [1], []).state for params in made]  # type: ignore[union-attr]
    assert len(rows._mirostats) == 3
    again = rows.row(made[8], [1], [4])
    assert again is not None
    assert again.state.warping is states[8].warping
    other = rows.row(made[0], [1], [4])
    assert other is not None
    assert other.state.warping is not states[0].warping


class NewerBatch:
    """What the newer runner keeps for logits processors, without its kernels, which need an accelerator."""

    def __init__(self) -> None:
        newer = pytest.importorskip("vllm.v1.worker.gpu.sample.logits_processor")
        self._context: Callable[..., Any] = newer.LogitsContext
        self.free = list(range(MOST))
        self.places: dict[str, int] = {}
        self.tokens = torch.zeros((MOST, 256), dtype=torch.int32)
        self.prompt_len, self.prefill_len = (np.zeros(MOST, np.int32) for _ in range(2))
        state = newer.LogitsProcRequestState(
            device=CPU, max_num_reqs=MOST, vocab_size=VOCABULARY,
            all_token_ids=SimpleNamespace(gpu=self.tokens), prompt_len=SimpleNamespace(np=self.prompt_len),
            prefill_len=SimpleNamespace(np=self.prefill_len), total_len=None,
        )  # fmt: skip
        (ours,) = newer.loader._load_v2_logitsprocs_by_fqcns([PROCESSOR])
        self.processor = ours(None, state)

    def add(self, request: Request) -> bool:
        place = self.places[request.name] = self.free.pop(len(self.free) // 2)
        tokens = [*request.prompt, *request.output]
        self.tokens[place, : len(tokens)] = torch.tensor(tokens)
        self.prompt_len[place], self.prefill_len[place] = len(request.prompt), len(tokens)
        return bool(self.processor.add_request(place, request.vllm))

    def remove(self, request: Request) -> None:
        self.free.append(self.places.pop(request.name))

    def apply(self, logits: torch.Tensor, order: list[Request], short: int = 0) -> torch.Tensor:
        """short: tokens that the prompts' ends are away."""
        places = np.array([self.places[request.name] for request in order])
        lengths = torch.tensor([len(r.prompt) + len(r.output) - short for r in order])
        mapping = torch.from_numpy(places)
        result: torch.Tensor = self.processor.apply(
            logits,
            self._context(
                expanded_idx_mapping=mapping, idx_mapping=mapping, idx_mapping_np=places,
                expanded_local_pos=torch.zeros_like(lengths), input_ids=self.tokens[mapping, lengths - 1],
                pos=lengths - 1, seq_lens_upper_bound_np=lengths.numpy(),
            ),
        )  # fmt: skip
        return result

    def append(self, request: Request, token: int) -> None:
        place = self.places[request.name]
        self.tokens[place, len(request.prompt) + len(request.output)] = token


def test_the_newer_runners_interface_gives_our_samplers_tokens() -> None:
    rng = np.random.default_rng(6)
    side, waiting, running = NewerBatch(), requests(), list[Request]()
    for step in range(60):
        for request in [r for r in running if rng.random() < 0.15]:
            running.remove(request)
            side.remove(request)
            if len(request.output) < 25:
                waiting.append(request)
        while waiting and len(running) < 40:
            request = waiting.pop(int(rng.integers(len(waiting))))
            running.append(request)
            assert side.add(request) == request.wanted
            if not request.output:
                # The first chunk of its prompt: whatever comes of it is dropped.
                logits = random_logits(1, VOCABULARY)
                assert torch.equal(side.apply(logits.clone(), [request], short=1), logits)
        rng.shuffle(running)  # type: ignore[arg-type]
        if not running:
            break
        logits = random_logits(len(running), VOCABULARY, seed=step)
        # What vLLM masks by itself stands before us.
        for row, request in zip(logits, running, strict=True):
            if request.params.allowed_token_ids is not None:
                others = torch.ones(VOCABULARY, dtype=torch.bool)
                others[list(request.params.allowed_token_ids)] = False
                row[others] = -torch.inf
            if len(request.output) < request.params.min_tokens:
                row[list(request.params.stop_token_ids)] = -torch.inf
        got = side.apply(logits.clone(), running)
        for row, before, request in zip(got, logits, running, strict=True):
            if request.wanted:
                assert row.isfinite().nonzero().flatten().tolist() == [request.expected(before)]
            else:
                assert torch.equal(row, before)
            token = int(row.argmax())
            side.append(request, token)
            request.output.append(token)
            request.state.output_token_ids.append(token)


def test_what_is_loaded_into_the_engines_process_is_light() -> None:
    look = (
        "import sys, vllm.v1.engine.core as _;"
        "before = set(sys.modules);"
        f"import {PROCESSOR.partition(':')[0]};"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    found = subprocess.run([sys.executable, "-P", "-c", look], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr[-2000:]
    assert set(eval(found.stdout.splitlines()[-1])) <= {"engine", "handlers", "properties", "vllm"}


def test_a_request_carries_only_what_changes_its_answer() -> None:
    params = to_vllm(compat.load(), RequestSampling(temperature=0.7, top_p=0.5, stop=("x",), logprobs=3), 1)
    assert params.extra_args is None
    params = to_vllm(compat.load(), RequestSampling(top_a=0.5, temperature=0.7, top_p=0.5, stop=("no",)), 2)
    assert list(params.extra_args) == [KEY]
    assert b"no" not in params.extra_args[KEY]
    assert (params.temperature, params.top_p, params.stop, params.n) == (1.0, 1.0, ["no"], 2)
    assert params.seed is not None
