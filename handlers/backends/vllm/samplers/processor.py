"""The logits processor that vLLM loads into its engine's process, for both of its model runners.

It stands before everything in vLLM that draws, and holds only rows of requests that need it: with none, `apply` returns
the logits as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from handlers.backends.vllm.compat import logits_processor, newer_logits_processor, process_dict_updates
from handlers.backends.vllm.samplers.rows import Row, Rows, asks, leave_chosen

_Older: Any = logits_processor()
_Newer: Any = newer_logits_processor() or object


class SamplerProcessor(_Older, _Newer):  # type: ignore[misc]
    """See vLLM's `LogitsProcessor`, of which there are two with one name.

    The older runner calls `update_state` with who came, went and moved, then `apply(logits)`; its lists of output
    tokens grow by themselves. The newer one calls `add_request` with a place, then `apply(logits, context)`; which
    tokens a place has is on the device, so that they cost one wait for it, in steps with such requests alone.
    """

    def __init__(self, vllm_config: Any, where: Any, pinned: bool = False) -> None:
        """where: a device, or the newer runner's LogitsProcRequestState. pinned: the older runner's alone."""
        self._known = Rows()
        self._places = where
        self._asking: dict[int, Any] = {}
        self._rows: dict[int, Row] = {}
        self._update = process_dict_updates()

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is not None:
            self._update(self._rows, batch_update, self._known.row)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Whether the request that takes this place needs the processor."""
        self._rows.pop(req_idx, None)
        self._asking.pop(req_idx, None)
        if needed := asks(sampling_params):
            self._asking[req_idx] = sampling_params
        return needed

    def apply(self, logits: Tensor, context: Any = None) -> Tensor:
        rows = self._present(context) if self._asking else self._rows
        if rows:
            leave_chosen(logits, rows)
        return logits

    def _present(self, context: Any) -> dict[int, Row]:
        """The newer runner's rows -> ours, with the tokens that they have now."""
        places = {
            row: place for row, place in enumerate(context.idx_mapping_np.tolist()) if place in self._asking
        }
        if not places:
            return {}
        where = torch.tensor(list(places), dtype=torch.int64).to(context.pos.device, non_blocking=True)
        seen = torch.stack((context.pos[where].long() + 1, context.input_ids[where].long())).tolist()
        present = {}
        for (row, place), length, last in zip(places.items(), *seen, strict=True):
            # Before a prompt's end there is nothing to choose: vLLM drops the token.
            if length >= int(self._places.prefill_len.np[place]):
                present[row] = self._grown(place, length, last)
        return present

    def _grown(self, place: int, length: int, last: int) -> Row:
        """length: tokens of prompt and answer by now. last: the newest of them."""
        row = self._rows.get(place)
        known = 0 if row is None else len(row.prompt) + len(row.output)
        if row is None or not known <= length <= known + 1:
            tokens = self._places.all_token_ids.gpu[place, :length].tolist()
            of_prompt = int(self._places.prompt_len.np[place])
            row = self._known.row(self._asking[place], tokens[:of_prompt], tokens[of_prompt:])
            assert row is not None, "asked for it when it was added"
            self._rows[place] = row
        elif length > known:
            row.output.append(last)
        return row
