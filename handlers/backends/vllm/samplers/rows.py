"""Rows of a vLLM batch whose tokens our sampler chooses; knows nothing of vLLM but `seed` and `extra_args`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from engine.sampler import Sampler, SamplingState
from engine.sampling_params import SamplingParams
from engine.warping import Warping
from handlers.backends.vllm.samplers.carried import KEY, Carried

_REMEMBERED = 4096
"""Answers whose Mirostat may be taken up again after they lost their place in the batch."""

_ELEMENTS = 1 << 22
"""Of the logits that are sampled at a time: vLLM leaves little memory beside its cache."""


class Row:
    """One answer in the batch.

    prompt, output: token ids; output grows while the answer does, and nobody but its owner changes it.
    constrained: a grammar has masked the logits already.
    """

    __slots__ = ("_followed", "_params", "_seed", "_state", "_warping", "constrained", "output", "prompt")

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        prompt: Sequence[int],
        output: list[int],
        warping: Warping | None,
        constrained: bool = False,
    ) -> None:
        self.prompt, self.output = prompt, output
        self.constrained = constrained
        self._params, self._seed, self._warping = params, seed, warping
        self._followed = 0
        self._state = self._begun()

    @property
    def state(self) -> SamplingState:
        """Of the sampler, following the output as it is now."""
        if len(self.output) < self._followed:
            self._state = self._begun()  # vLLM took tokens back that the old one has followed
        self._followed = len(self.output)
        return self._state

    def _begun(self) -> SamplingState:
        state = SamplingState(self._params, self.prompt, self.output, (), self._seed)
        state.warping = self._warping
        return state


class Rows:
    """Makes the rows of one engine, and remembers Mirostat for those that were preempted."""

    def __init__(self) -> None:
        self._mirostats: OrderedDict[tuple[int, int], Warping] = OrderedDict()

    def row(self, params: Any, prompt: Sequence[int] | None, output: list[int]) -> Row | None:
        """None for a request that vLLM samples by itself. params: vLLM's SamplingParams of one answer."""
        if not asks(params):
            return None
        carried = msgspec.msgpack.decode(params.extra_args[KEY], type=Carried)
        seed = (params.seed or 0) % 2**63
        warping = Warping.of(carried.params, seed)
        if warping is not None and warping.mirostat:
            warping = self._remembered((carried.request, seed), warping)
        constrained = params.structured_outputs is not None
        return Row(carried.params, seed, prompt or (), output, warping, constrained)

    def _remembered(self, answer: tuple[int, int], new: Warping) -> Warping:
        warping = self._mirostats.setdefault(answer, new)
        self._mirostats.move_to_end(answer)
        if len(self._mirostats) > _REMEMBERED:
            self._mirostats.popitem(last=False)
        return warping


def asks(params: Any) -> bool:
    """A request, by vLLM's SamplingParams, that needs a row."""
    return KEY in (params.extra_args or ())


def leave_chosen(logits: Tensor, rows: Mapping[int, Row]) -> None:
    """Choose a token for some rows of the logits [B, V] and mask all others in them, in place.

    A row that has no token (NaN, +inf, or nothing but -inf) stays as it is; but where the samplers leave nothing of
    what a grammar allows, a token that it does not allow is chosen, at which vLLM ends the answer as failed.
    """
    vocab_size = logits.shape[-1]
    sampler = Sampler(vocab_size, logits.device)
    some = max(1, _ELEMENTS // vocab_size)
    numbers = list(rows)
    for start in range(0, len(numbers), some):
        part = numbers[start : start + some]
        where = torch.tensor(part, dtype=torch.int64).to(logits.device, non_blocking=True)
        chosen, _ = sampler.sample(logits[where], [rows[row].state for row in part])
        found = [(row, token) for row, token in zip(part, chosen, strict=True) if token >= 0]
        for row, token in zip(part, chosen, strict=True):
            if token < 0 and rows[row].constrained:
                lowest = int(logits[row].argmin())
                if logits[row, lowest] == -torch.inf:
                    found.append((row, lowest))
        if found:
            where, tokens = torch.tensor(found, dtype=torch.int64).to(logits.device).unbind(1)
            logits[where] = -torch.inf
            logits[where, tokens] = 0.0
