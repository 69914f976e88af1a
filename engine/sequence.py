"""One request inside the engine: its tokens, how far they are computed, and the blocks that hold them."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.messages import Add, Picture
from engine.sampler import Logprobs, SamplingState


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's facts; what can be derived from them is a property.

    `num_computed` chases `num_tokens`: the keys and values of that many tokens are in the cache. There is no
    prefill or decode phase; whoever has one token left to compute is decoding.
    """

    request_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    pictures: list[Picture]
    sampling: SamplingState
    max_tokens: int
    priority: int = 0
    order: int = 0
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered_blocks: int = 0
    cached_tokens: int = -1
    prompt_logprobs: list[Logprobs] | None = None
    prompt_logprobs_sent: bool = False

    @classmethod
    def from_message(cls, add: Add, *, max_model_len: int, order: int) -> Sequence:
        room = max_model_len - len(add.token_ids)
        wanted = add.params.max_tokens
        return cls(
            request_id=add.request_id,
            token_ids=list(add.token_ids),
            num_prompt_tokens=len(add.token_ids),
            pictures=add.pictures,
            sampling=SamplingState(
                params=add.params,
                prompt_token_ids=add.token_ids,
                output_token_ids=[],
                eos_token_ids=add.eos_token_ids,
                seed=add.seed,
            ),
            max_tokens=room if wanted is None else min(wanted, room),
            priority=add.priority,
            order=order,
            prompt_logprobs=[] if add.params.prompt_logprobs is not None else None,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.sampling.output_token_ids)

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """The prompt is in the cache and exactly the newest token is not."""
        return self.num_output_tokens > 0 and self.num_uncomputed == 1

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: lower priority values, then earlier arrivals."""
        return (self.priority, self.order)

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.sampling.output_token_ids.append(token_id)

    def pictures_within(self, start: int, stop: int) -> list[Picture]:
        """The pictures that have a token in [start, stop)."""
        return [p for p in self.pictures if p.offset < stop and p.end > start]
