"""The logits processor that vLLM loads into its engine's process, for both of its model runners.

It runs before vLLM draws, and knows only the rows of the batch that need our samplers; without any, `apply` returns
the logits unchanged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from engine.sampler import Sampler
from engine.sampling_params import SamplingParams
from engine.sampling_state import SamplingState, Warping
from handlers.backends.vllm.compat import RunnerRequests, logits_processor_classes, process_dict_updates
from handlers.backends.vllm.sampling import KEY, Carried

REMEMBERED = 4096
"""Completions whose Mirostat state outlasts a preemption."""

MOST_LOGITS = 1 << 22
"""The most logits that are sampled at a time, since vLLM leaves little memory."""

_Older, _Newer = logits_processor_classes()


class SamplerProcessor(_Older, _Newer):  # type: ignore[misc, valid-type]
    """Implements both of vLLM's classes named `LogitsProcessor`.

    The older runner calls `update_state` with the changes of its batch, then `apply(logits)`; its lists of output
    tokens grow by themselves. The newer one calls `add_request` with an index, then `apply(logits, context)`; its
    tokens are on the device, so a step that has such requests waits for the device once.
    """

    def __init__(self, vllm_config: Any, where: Any, pinned: bool = False) -> None:
        """where: the older runner's device, or the newer one's state of its requests."""
        self._requests = RunnerRequests(where)
        self._asking: dict[int, Any] = {}
        self._rows: dict[int, Row] = {}
        self._mirostats: OrderedDict[tuple[int, int], Warping] = OrderedDict()
        self._update = process_dict_updates()

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is not None:
            self._update(self._rows, batch_update, self.row)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Return whether this request needs the processor."""
        self._rows.pop(req_idx, None)
        self._asking.pop(req_idx, None)
        if needed := _asks(sampling_params):
            self._asking[req_idx] = sampling_params
        return needed

    def apply(self, logits: Tensor, context: Any = None) -> Tensor:
        rows = self._present(context) if self._asking else self._rows
        if rows:
            leave_chosen(logits, rows)
        return logits

    def _present(self, context: Any) -> dict[int, Row]:
        """Return the rows of the newer runner's batch that are ours, with their current tokens."""
        places = {row: place for row, place in enumerate(context.idx_mapping_np.tolist()) if place in self._asking}
        if not places:
            return {}
        where = torch.tensor(list(places), dtype=torch.int64).to(context.pos.device, non_blocking=True)
        seen = torch.stack((context.pos[where].long() + 1, context.input_ids[where].long())).tolist()
        return {
            row: self._grown(place, length, last)
            for (row, place), length, last in zip(places.items(), *seen, strict=True)
            # Before the end of a prompt there is nothing to choose: vLLM drops the token.
            if self._requests.is_prefilled(place, length)
        }

    def _grown(self, place: int, length: int, last: int) -> Row:
        """length: the tokens of prompt and output. last: the newest of them."""
        row = self._rows.get(place)
        known = 0 if row is None else len(row.prompt) + len(row.output)
        if row is None or not known <= length <= known + 1:
            row = self.row(self._asking[place], *self._requests.tokens(place, length))
            assert row is not None, "asked for it when it was added"
            self._rows[place] = row
        elif length > known:
            row.output.append(last)
        return row

    def row(self, params: Any, prompt: Sequence[int] | None, output: list[int]) -> Row | None:
        """Return the row of a completion; None if vLLM samples it by itself. params: vLLM's SamplingParams.

        The Mirostat state of a completion that was preempted is remembered.
        """
        if not _asks(params):
            return None
        carried = msgspec.msgpack.decode(params.extra_args[KEY], type=Carried)
        seed = (params.seed or 0) % 2**63
        warping = Warping.of(carried.params, seed)
        if warping is not None and warping.mirostat:
            completion = (carried.request, seed)
            warping = self._mirostats.setdefault(completion, warping)
            self._mirostats.move_to_end(completion)
            if len(self._mirostats) > REMEMBERED:
                self._mirostats.popitem(last=False)
        return Row(carried.params, seed, prompt or (), output, warping, params.structured_outputs is not None)


class Row:
    """A completion whose tokens our sampler chooses.

    Attributes:
        prompt: Its token ids.
        output: Its token ids; they grow while the completion does.
        constrained: Whether a grammar has masked the logits already.
    """

    __slots__ = ("_followed", "_params", "_seed", "_state", "_warping", "constrained", "output", "prompt")

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        prompt: Sequence[int],
        output: list[int],
        warping: Warping | None,
        constrained: bool,
    ) -> None:
        self.prompt, self.output, self.constrained = prompt, output, constrained
        self._params, self._seed, self._warping = params, seed, warping
        self._followed = 0
        self._state = self._begun()

    @property
    def state(self) -> SamplingState:
        """The sampler's state, at the end of the output."""
        if len(self.output) < self._followed:
            self._state = self._begun()  # vLLM has taken tokens back
        self._followed = len(self.output)
        return self._state

    def _begun(self) -> SamplingState:
        state = SamplingState(self._params, self.prompt, self.output, (), self._seed)
        state.warping = self._warping
        return state


def _asks(params: Any) -> bool:
    return KEY in (params.extra_args or ())


def leave_chosen(logits: Tensor, rows: Mapping[int, Row]) -> None:
    """Choose a token for some rows of the logits [B, V] and mask all others in them, in place.

    A row without a token (NaN, +inf, or nothing but -inf) stays as it is; but if the samplers leave nothing of what a
    grammar allows, a token that it does not allow is chosen, at which vLLM ends the completion as failed.
    """
    vocab_size = logits.shape[-1]
    sampler = Sampler(vocab_size, logits.device)
    some = max(1, MOST_LOGITS // vocab_size)
    numbers = list(rows)
    for start in range(0, len(numbers), some):
        part = numbers[start : start + some]
        where = torch.tensor(part, dtype=torch.int64).to(logits.device, non_blocking=True)
        chosen, _ = sampler.sample(logits[where], [rows[row].state for row in part])
        found = []
        for row, token in zip(part, chosen, strict=True):
            if token < 0 and rows[row].constrained:
                lowest = int(logits[row].argmin())
                token = lowest if logits[row, lowest] == -torch.inf else token
            if token >= 0:
                found.append((row, token))
        if found:
            where, tokens = torch.tensor(found, dtype=torch.int64).to(logits.device).unbind(1)
            logits[where] = -torch.inf
            logits[where, tokens] = 0.0
