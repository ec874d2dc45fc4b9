"""The router's core and modelled nodes on a virtual clock.

A shell like the router's server: events go into the core, its commands to the nodes, their reports back as
events. What nodes and links take comes from the cost model; messages take no time.
"""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Final

from kvrelay.core.ids import AttemptId, NodeId, RequestId
from kvrelay.core.kv import KVFingerprint
from kvrelay.core.kv_events import KVChanges, KVEvent
from kvrelay.core.node_messages import (
    AttemptFinished,
    HandoffVerified,
    KVReleased,
    NodeDescription,
    PrefillFinished,
    ReleaseKV,
    ReserveDecode,
    Role,
    StartPrefill,
    TokenBatch,
)
from kvrelay.core.request import FinishReason, TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.router.admission_queue import QueueCounts
from kvrelay.router.core import RouterCore
from kvrelay.router.events import (
    DeliverFailed,
    Effect,
    Event,
    NodeAttached,
    NodeReported,
    RequestSubmitted,
    SendCommand,
    SessionId,
    Ticked,
)
from kvrelay.simulator.cost_model import CostModel
from kvrelay.simulator.decode_node import DecodeJob, SimDecodeNode
from kvrelay.simulator.event_queue import EventQueue
from kvrelay.simulator.gap_times import own_percentile_s
from kvrelay.simulator.measurements import Measurements
from kvrelay.simulator.policies import make_policy
from kvrelay.simulator.prefill_node import PrefillJob, SimPrefillNode
from kvrelay.simulator.pull_plans import PullPlans
from kvrelay.simulator.scenario import NEVER_S, Scenario
from kvrelay.simulator.trace import Trace
from kvrelay.simulator.trace_prompt import TracePrefixes, TracePrompt

_MODEL: Final = "simulated"
_FINGERPRINT: Final = KVFingerprint(_MODEL, "bfloat16", 32, 8, 128, "rope")
_HOLDS_NOTHING: Final = KVEvent(1, 0, KVChanges(cleared=True))
"""Said once, so that the core has nothing to guess: contents reach the policy another way."""
_SESSION: Final = SessionId(1)
_TICK_S: Final = 0.25
_MAX_MODEL_LEN: Final = 2**31


class Simulation:
    """One run; `run` may be called once."""

    def __init__(self, trace: Trace, scenario: Scenario, costs: CostModel) -> None:
        """`trace` has its arrivals at the load of `scenario` already."""
        self._trace = trace
        self._scenario = scenario
        self._costs = costs
        self._clock = EventQueue()
        num = len(trace)
        self.seen = Measurements.of(num)
        num_prefill, num_decode = scenario.num_prefill_nodes, max(1, scenario.num_decode_nodes)
        max_entries = num_prefill * scenario.cache_blocks + 1_000_000
        self._prefixes = TracePrefixes(max_entries, num_prefill, num_decode)
        self._policy = PullPlans(make_policy(scenario.policy, self._prefixes, costs, scenario.cache_blocks))
        self._core = RouterCore(scenario.core_config(), 1, self._policy, Random(scenario.seed))
        self.prefill_nodes = [
            SimPrefillNode(number, scenario.cache_blocks, trace.block_tokens, costs)
            for number in range(num_prefill)
        ]
        self.decode_nodes = [
            SimDecodeNode(number, costs.decode, self.seen.gaps) for number in range(num_decode)
        ]
        self._nodes_by_id: dict[NodeId, int] = {}
        self._decode_of: dict[AttemptId, int] = {}
        self._sampling: dict[int, SamplingParams] = {}
        self._planned_due: list[float] = [float("inf")] * num_decode
        self._is_ticking = False

    def run(self) -> Measurements:
        """Serve the whole trace."""
        self._attach()
        clock = self._clock
        arrivals = self._trace.arrivals_s.tolist()
        for index, arrival_s in enumerate(arrivals):
            while (next_s := clock.next_s) is not None and next_s < arrival_s:
                clock.step()
            clock.now_s = arrival_s
            self._arrive(index)
        while clock.next_s is not None:
            clock.step()
        self.seen.end_s = clock.now_s
        return self.seen

    # ---- the shell around the core -------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        for effect in self._core.handle(event, self._clock.now_s):
            self._perform(effect)

    def _perform(self, effect: Effect) -> None:
        if isinstance(effect, SendCommand):
            command = effect.command
            if isinstance(command, StartPrefill):
                self._start_prefill(self._nodes_by_id[effect.node_id], command)
            elif isinstance(command, ReserveDecode):
                self._decode_of[command.attempt] = self._nodes_by_id[effect.node_id]
            elif isinstance(command, ReleaseKV):
                self._clock.at(self._clock.now_s, partial(self._release, effect.node_id, command.attempt))
        elif isinstance(effect, DeliverFailed):
            self.seen.num_refused += 1

    def _attach(self) -> None:
        scenario = self._scenario
        for number in range(scenario.num_prefill_nodes):
            self._attach_node(Role.PREFILL, number, number, 2**31)
        num_blocks = self._costs.decode.kv_tokens // self._trace.block_tokens
        for number in range(len(self.decode_nodes)):
            blocks = max(1, num_blocks) if scenario.has_decode else 2**31
            self._attach_node(Role.DECODE, number, scenario.num_prefill_nodes + number, blocks)

    def _attach_node(self, role: Role, number: int, slot: int, num_blocks: int) -> None:
        node_id = NodeId(f"{role}-{number}")
        self._nodes_by_id[node_id] = number
        self._prefixes.enter(node_id, slot)
        is_limited = role is Role.DECODE and self._scenario.has_decode
        description = NodeDescription(
            node_id=node_id,
            incarnation=1,
            role=role,
            model=_MODEL,
            engine="sim",
            fingerprint=_FINGERPRINT,
            vocab_size=2,
            max_model_len=_MAX_MODEL_LEN,
            num_blocks=num_blocks,
            block_size=self._trace.block_tokens,
            max_num_seqs=self._costs.decode.max_num_seqs if is_limited else 2**31,
            transfer_address=node_id,
        )
        self._tell(NodeAttached(description))
        self._tell(NodeReported(node_id, kv=_HOLDS_NOTHING))

    @property
    def queue_counts(self) -> QueueCounts:
        """What the router refused, and why."""
        return self._core.status(self._clock.now_s).queue

    # ---- requests ------------------------------------------------------------------------------------

    def _arrive(self, index: int) -> None:
        num_tokens = int(self._trace.num_prompt_tokens[index])
        num_output = int(self._trace.num_output_tokens[index]) if self._scenario.has_decode else 1
        sampling = self._sampling.get(num_output)
        if sampling is None:
            sampling = self._sampling[num_output] = SamplingParams(max_tokens=num_output, ignore_eos=True)
        prompt = TracePrompt.of(index, num_tokens, self._trace.blocks_of(index))
        request = TokenRequest(prompt, num_tokens, sampling)
        terms, deadline_s = self._scenario.asked_for(self._trace.terms_of(index), self._clock.now_s)
        name = RequestId(str(index))
        self._tell(RequestSubmitted(name, _SESSION, index, _MODEL, request, deadline_s, terms))
        self._tick_while_queued()

    def _tick_while_queued(self) -> None:
        """What waits too long is the core's to see, when it is told that time passed."""
        scenario = self._scenario
        if (scenario.queue_timeout_s < 1e9 or scenario.has_deadlines) and not self._is_ticking:
            self._is_ticking = True
            self._clock.at(self._clock.now_s + _TICK_S, self._tick)

    def _tick(self) -> None:
        self._is_ticking = False
        self._tell(Ticked())
        if self._core.next_tick_s(self._clock.now_s) <= self._clock.now_s:
            self._tick_while_queued()

    def _release(self, node_id: NodeId, attempt: AttemptId) -> None:
        self._decode_of.pop(attempt, None)
        self._tell(NodeReported(node_id, None, (KVReleased(attempt),)))

    # ---- prefill -------------------------------------------------------------------------------------

    def _start_prefill(self, number: int, command: StartPrefill) -> None:
        prompt = command.request.token_ids
        assert isinstance(prompt, TracePrompt)
        holder, num_pull_tokens = self._policy.take(command.attempt)
        job = PrefillJob(
            attempt=command.attempt,
            request=prompt.number,
            num_tokens=prompt.num_tokens,
            blocks=prompt.block_keys,
            queued_s=self._clock.now_s,
            pull_from=self.prefill_nodes[self._nodes_by_id[holder]] if holder else None,
            num_pull_blocks=-(-num_pull_tokens // self._trace.block_tokens),
        )
        done_s = self.prefill_nodes[number].add(job, self._clock.now_s)
        if done_s is not None:
            self._clock.at(done_s, partial(self._finish_prefill, number))

    def _finish_prefill(self, number: int) -> None:
        now_s, node = self._clock.now_s, self.prefill_nodes[number]
        job, stored, removed, next_s = node.finish(now_s)
        if next_s is not None:
            self._clock.at(next_s, partial(self._finish_prefill, number))
        if stored:
            self._prefixes.index.store(number, stored)
        if removed:
            self._prefixes.index.remove(number, removed)
        self._count_prefill(job)
        node_id, attempt = NodeId(f"{Role.PREFILL}-{number}"), job.attempt
        if job.num_pulled_tokens:
            self._policy.note_pulled(node_id, job.num_pulled_tokens, job.pull_s)
        waited_s = job.started_s - job.queued_s + job.pull_s
        reports: tuple[PrefillFinished | AttemptFinished, ...] = (
            PrefillFinished(attempt, job.num_cached_tokens, waited_s, job.compute_s),
        )
        num_left = self._num_output(job.request) - 1
        if not num_left:
            reports = (*reports, AttemptFinished(attempt, FinishReason.LENGTH))
        self._tell(NodeReported(node_id, TokenBatch((attempt,), (0,), (1,), (0,)), reports))
        if num_left:
            verified_s = now_s + self._costs.link.handoff_s(job.num_tokens)
            self._clock.at(verified_s, partial(self._hand_off, node_id, job, now_s, num_left))

    def _count_prefill(self, job: PrefillJob) -> None:
        seen = self.seen
        elapsed_s = self._clock.now_s - float(self._trace.arrivals_s[job.request])
        seen.ttft_s[job.request] = seen.total_s[job.request] = elapsed_s
        seen.num_placed += 1
        seen.num_prompt_tokens += job.num_tokens
        seen.num_cached_tokens += job.num_cached_tokens
        seen.num_pulled_tokens += job.num_pulled_tokens
        seen.num_pulls += job.num_pulled_tokens > 0

    # ---- decode --------------------------------------------------------------------------------------

    def _hand_off(self, prefill_id: NodeId, job: PrefillJob, first_token_s: float, num_left: int) -> None:
        attempt, number = job.attempt, self._decode_of.get(job.attempt)
        if number is None:
            return  # its time was up
        verified = HandoffVerified(attempt, job.num_tokens, 1, self._clock.now_s - first_token_s, "modelled")
        self._tell(NodeReported(NodeId(f"{Role.DECODE}-{number}"), None, (verified,)))
        self._tell(NodeReported(prefill_id, None, (KVReleased(attempt),)))
        room = job.num_tokens + num_left + 1
        sequence = DecodeJob(attempt, job.request, job.num_tokens, num_left, room, first_token_s)
        self.decode_nodes[number].add(sequence, self._clock.now_s)
        self._plan_decode(number)

    def _plan_decode(self, number: int) -> None:
        due_s = self.decode_nodes[number].due_s
        if due_s != self._planned_due[number] and due_s < NEVER_S:
            self._planned_due[number] = due_s
            self._clock.at(due_s, partial(self._advance_decode, number, due_s))

    def _advance_decode(self, number: int, due_s: float) -> None:
        node = self.decode_nodes[number]
        if node.due_s != due_s or self._planned_due[number] != due_s:
            return
        self._planned_due[number] = float("inf")
        for job in node.advance():
            self.seen.itl_p99_s[job.request] = own_percentile_s(node.gaps_of(job), 99.0)
            if job.attempt in self._decode_of:
                self._finish_decode(number, job)
        self._plan_decode(number)

    def _finish_decode(self, number: int, job: DecodeJob) -> None:
        del self._decode_of[job.attempt]
        arrival_s = float(self._trace.arrivals_s[job.request])
        self.seen.total_s[job.request] = self._clock.now_s - arrival_s
        tokens = TokenBatch((job.attempt,), (1,), (job.num_tokens,), (0,) * job.num_tokens)
        finished = AttemptFinished(job.attempt, FinishReason.LENGTH)
        self._tell(NodeReported(NodeId(f"{Role.DECODE}-{number}"), tokens, (finished,)))

    def _num_output(self, request: int) -> int:
        return int(self._trace.num_output_tokens[request]) if self._scenario.has_decode else 1
