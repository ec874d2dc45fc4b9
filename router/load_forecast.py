"""When a request of one model would start, give its first token and end, by what is learned of the nodes.

Decode load is foretold, not read off: what runs when a request's decoding would begin is what runs now, less
what will have ended by then, and what waits before it. Every forecast comes in two kinds. What is *expected*
serves order, shares and people. What is *at best* leaves out of it as much as forecasts have been wrong by; a
request is refused only if it would be too late even then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvrelay.core.node_messages import PrefillFinished, Role
from kvrelay.core.request import TokenRequest
from kvrelay.router.cluster_state import ModelState
from kvrelay.router.decode_pace import DecodePace
from kvrelay.router.decode_timeline import DecodeTimeline
from kvrelay.router.drain_rate import DrainRate
from kvrelay.router.learned_costs import PrefillCosts
from kvrelay.router.online_fit import is_sample
from kvrelay.router.outlook import Demand
from kvrelay.router.output_lengths import OutputLengths

_HIT_MEMORY: Final = 0.02
_MIN_OBSERVED: Final = 8
_SURE_ERRORS: Final = 2.5
"""What is at best leaves out so many times what forecasts are off by on average."""
_SLOT: Final = 0
"""All prefill nodes of a model are one here."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the nodes of a model have room for, less those that drain."""

    num_prefill_nodes: int
    num_decode_nodes: int
    num_sequences: int
    num_tokens: int


class LoadForecast:
    """See the module. One for each model."""

    def __init__(self, min_chance: float) -> None:
        self.prefill_costs = PrefillCosts(1)
        self.lengths = OutputLengths()
        self.pace = DecodePace()
        self.timeline = DecodeTimeline()
        self.drain = DrainRate(min_chance)
        self._hit_share = 0.0
        self._capacity = Capacity(0, 0, 0, 0)
        self._capacity_of = -1

    # ---- what is asked --------------------------------------------------------------------------

    def capacity(self, model: ModelState) -> Capacity:
        """Read off the nodes once after each change of them."""
        if self._capacity_of != model.num_refreshes:
            self._capacity_of = model.num_refreshes
            prefill, decode = (
                [node for node in model.nodes[role].values() if not node.is_draining] for role in Role
            )
            self._capacity = Capacity(
                len(prefill),
                len(decode),
                sum(node.description.max_num_seqs for node in decode),
                sum(node.description.num_blocks * node.description.block_size for node in decode),
            )
            self.pace.num_nodes = max(1, len(decode))
        return self._capacity

    def demand(self, request: TokenRequest, growth_tokens: int, prefill_s: float | None = None) -> Demand:
        """What a request asks for; `prefill_s` is what its prefill takes, where a policy knows."""
        num_tokens = len(request.token_ids)
        cached = min(int(self._hit_share * num_tokens), num_tokens - 1)
        typical_s = self._prefill_s(num_tokens, cached)
        if prefill_s is None:
            at_best_s = self._prefill_s(num_tokens, num_tokens - 1)
        else:
            typical_s = at_best_s = prefill_s
        return Demand(
            prefill_s=typical_s,
            prefill_at_best_s=at_best_s * self.prefill_share_at_best,
            num_output_tokens=self.lengths.expected(request),
            least_output_tokens=self.lengths.at_least(request),
            num_room_tokens=num_tokens + min(request.num_remaining_tokens, growth_tokens),
        )

    @property
    def num_prefill_nodes(self) -> int:
        """As `capacity` saw them last."""
        return self._capacity.num_prefill_nodes

    @property
    def prefill_share_at_best(self) -> float:
        """How much of a foretold prefill is sure; nothing before some were measured."""
        return _sure_share(self.prefill_costs)

    @property
    def steps_share_at_best(self) -> float:
        """How much of a foretold decode step is sure; nothing before some were measured."""
        return _sure_share(self.pace)

    def step_now_s(self) -> float:
        """A step as things stand, with one sequence more."""
        return self.pace.next_step_s()

    def step_then_s(
        self, capacity: Capacity, start_s: float, num_ahead: float, tokens_ahead: float, now_s: float
    ) -> float:
        """A step at a later moment, when what is ahead in the queue runs as well, as far as there is room."""
        running, tokens = self.timeline.left_at(start_s, now_s)
        sequences = min(running + num_ahead + 1, capacity.num_sequences)
        return self.pace.step_s(sequences, min(tokens + tokens_ahead, capacity.num_tokens))

    def decode_room_in_s(
        self, capacity: Capacity, demand: Demand, num_ahead: float, tokens_ahead: float, now_s: float
    ) -> float:
        """Seconds until decode nodes have room for a request, after what is ahead of it."""
        timeline = self.timeline
        sequences = timeline.num_running + num_ahead + 1 - capacity.num_sequences
        tokens = timeline.num_tokens + tokens_ahead + demand.num_room_tokens - capacity.num_tokens
        found_s = timeline.free_in_s(sequences, tokens, now_s)
        if found_s < float("inf"):
            return found_s
        # More than runs now must end: rounds of answers one after another.
        rounds = max(sequences / max(1, capacity.num_sequences), tokens / max(1, capacity.num_tokens))
        return rounds * demand.num_output_tokens * self.step_now_s()

    def _prefill_s(self, num_tokens: int, num_cached: int) -> float:
        return self.prefill_costs.typical_one(num_tokens, num_cached)

    def least_step_s(self) -> float:
        """A step at best, with nothing else on the node."""
        return self.pace.step_s(1.0, 0.0) * self.steps_share_at_best

    def work_s(self, demand: Demand) -> float:
        """Seconds of one node that others can't have: a prefill, and decoding as `decode_work_s`."""
        return demand.prefill_s + self.decode_work_s(demand, demand.num_output_tokens - 1.0)

    def decode_work_s(self, demand: Demand, num_tokens: float) -> float:
        """What so many tokens take of a decode node, as far as the request fills it: by its place in the
        batch or by its room for KV, whichever is scarcer."""
        capacity = self._capacity
        fills = max(
            1.0 / max(1, capacity.num_sequences), demand.num_room_tokens / max(1, capacity.num_tokens)
        )
        return num_tokens * self.step_now_s() * fills * capacity.num_decode_nodes

    def backlog_s(self, num_tokens: int, num_prompts: int) -> float:
        """Seconds to prefill what waits on one node."""
        if not num_tokens:
            return 0.0
        num_prompts = max(1, num_prompts)
        mean = max(1, num_tokens // num_prompts)
        return num_tokens / mean * self._prefill_s(mean, min(int(self._hit_share * mean), mean - 1))

    # ---- what happens ---------------------------------------------------------------------------

    def note_placed(self, serial: int, demand: Demand, ttft_s: float, now_s: float) -> None:
        """An attempt was sent to its nodes, and should give its first token after `ttft_s`."""
        end_s = now_s + ttft_s + (demand.num_output_tokens - 1.0) * self.step_now_s()
        self.timeline.add(serial, demand.num_room_tokens, end_s, now_s)

    def note_prefilled(self, serial: int, report: PrefillFinished, num_tokens: int, now_s: float) -> None:
        """A prompt of so many tokens is computed; its sequence decodes from now on."""
        num_cached = min(report.num_cached_tokens, num_tokens)
        if is_sample(serial, self.prefill_costs.num_observed):
            self.prefill_costs.observe(_SLOT, [(num_tokens - num_cached, num_cached)], report.compute_s)
        self._hit_share += _HIT_MEMORY * (num_cached / num_tokens - self._hit_share)
        self.pace.begin(serial, num_tokens, now_s)

    def note_complete(self, serial: int, request: TokenRequest, num_output_tokens: int, now_s: float) -> None:
        """An answer was delivered as a whole."""
        self.lengths.observe(request, num_output_tokens)
        self.pace.end(serial, now_s, request.num_prompt_tokens + num_output_tokens)

    def note_over(self, serial: int, now_s: float) -> None:
        """An attempt has come to its end, whatever became of it."""
        self.timeline.remove(serial)
        self.pace.end(serial, now_s)


def _sure_share(learned: PrefillCosts | DecodePace) -> float:
    if learned.num_observed < _MIN_OBSERVED:
        return 0.0
    return max(0.0, 1.0 - _SURE_ERRORS * learned.relative_error)
