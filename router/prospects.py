"""Whether a request can still be served in time: its outlook, and when it is too late even at best."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from kvrelay.core.explanation import Decision
from kvrelay.core.node_messages import PrefillFinished
from kvrelay.router.cluster_state import ClusterState
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.fair_queue import FairQueue
from kvrelay.router.ledger import RequestEntry
from kvrelay.router.load_forecast import LoadForecast
from kvrelay.router.outlook import Outlook


@dataclass(slots=True, eq=False)
class Prospects:
    """See the module. A model's forecast is kept while the model is known."""

    config: RouterCoreConfig
    cluster: ClusterState
    _forecasts: dict[str, LoadForecast] = field(default_factory=dict)

    def forecast(self, model: str) -> LoadForecast:
        """What is learned of a model's nodes."""
        found = self._forecasts.get(model)
        if found is None:
            found = self._forecasts[model] = LoadForecast(self.config.min_chance)
        found.capacity(self.cluster.models[model])
        return found

    def forget_models(self) -> None:
        """Drop what is known of models that are not there any more."""
        for model in [name for name in self._forecasts if name not in self.cluster.models]:
            del self._forecasts[model]

    # ---- while it waits -------------------------------------------------------------------------

    def outlook(self, entry: RequestEntry, prefill_s: float | None = None) -> Outlook:
        """Of a request that has just come; `prefill_s` is what its prefill takes, where the policy knows."""
        forecast = self.forecast(entry.model)
        demand = forecast.demand(entry.request, self.config.growth_tokens, prefill_s)
        ttft_timeout_s = entry.terms.ttft_timeout_s
        ttft_deadline_s = math.inf if ttft_timeout_s is None else entry.submitted_s + ttft_timeout_s
        decode_s = (demand.num_output_tokens - 1.0) * forecast.step_now_s()
        least_decode_s = (demand.least_output_tokens - 1.0) * forecast.least_step_s()
        latest_s = min(ttft_deadline_s, entry.deadline_s - decode_s) - demand.prefill_s
        last_s = min(ttft_deadline_s, entry.deadline_s - least_decode_s) - demand.prefill_at_best_s
        return Outlook(
            demand=demand,
            work_s=forecast.work_s(demand),
            due_s=min(latest_s, entry.submitted_s + self.config.queue_timeout_s),
            hopeless_s=last_s,
            ttft_deadline_s=ttft_deadline_s,
        )

    def with_wait(self, entry: RequestEntry, queue: FairQueue[RequestEntry], now_s: float) -> Outlook:
        """Of a request that has to wait in `queue`, where it is already."""
        forecast, outlook = self.forecast(entry.model), entry.outlook
        capacity = forecast.capacity(self.cluster.models[entry.model])
        work_s = queue.work_ahead_s(entry)
        share = work_s / max(queue.total_work_s, 1e-9)
        num_ahead, tokens_ahead = share * (len(queue) - 1), share * queue.total_tokens
        start_s = now_s + max(
            forecast.drain.wait_s(work_s, capacity.num_prefill_nodes, now_s),
            forecast.decode_room_in_s(capacity, outlook.demand, num_ahead, tokens_ahead, now_s),
        )
        step_s = forecast.step_then_s(capacity, start_s, num_ahead, tokens_ahead, now_s)
        return replace(outlook, wait_s=start_s - now_s, step_s=step_s, has_waited=True)

    def is_in_vain(self, entry: RequestEntry, now_s: float) -> bool:
        """Whether a request that waits would be too late even if it waited much less than foretold, and its
        decoding were as quick as may be beside what will run by then."""
        forecast, outlook = self.forecast(entry.model), entry.outlook
        start_s = now_s + forecast.drain.at_best_s(outlook.wait_s, outlook.work_s)
        first_s = start_s + outlook.demand.prefill_at_best_s
        step_s = outlook.step_s * forecast.steps_share_at_best
        end_s = first_s + (outlook.demand.least_output_tokens - 1.0) * step_s
        return first_s > outlook.ttft_deadline_s or end_s > entry.deadline_s

    # ---- when it is placed ----------------------------------------------------------------------

    def is_too_late(self, entry: RequestEntry, decision: Decision, now_s: float) -> bool:
        """Whether a request would be too late even at best if it were placed so now."""
        forecast, demand = self.forecast(entry.model), entry.outlook.demand
        first_s = now_s + self.ttft_s(entry, decision) * forecast.prefill_share_at_best
        step_s = forecast.step_now_s() * forecast.steps_share_at_best
        end_s = first_s + (demand.least_output_tokens - 1.0) * step_s
        return first_s > entry.outlook.ttft_deadline_s or end_s > entry.deadline_s

    def ttft_s(self, entry: RequestEntry, decision: Decision) -> float:
        """From the placement to the first token: the policy's own word, or by what its node has to do."""
        if decision.predicted_ttft_s is not None:
            return decision.predicted_ttft_s
        node = self.cluster.nodes[decision.prefill_node]
        backlog_s = self.forecast(entry.model).backlog_s(node.outstanding_prefill_tokens, node.num_in_flight)
        return backlog_s + entry.outlook.demand.prefill_s

    def placed(self, entry: RequestEntry, decision: Decision, now_s: float) -> Outlook:
        """Enter a request that goes to its nodes now into the forecast. Returns its outlook, with its end."""
        forecast, outlook = self.forecast(entry.model), entry.outlook
        ttft_s = self.ttft_s(entry, decision)
        forecast.note_placed(entry.serial, outlook.demand, ttft_s, now_s)
        decode_s = (outlook.demand.num_output_tokens - 1.0) * forecast.step_now_s()
        return replace(outlook, total_s=now_s - entry.submitted_s + ttft_s + decode_s)

    # ---- what is learned ------------------------------------------------------------------------

    def note_prefilled(self, entry: RequestEntry, report: PrefillFinished, now_s: float) -> float:
        """Returns by how many seconds it took more than was expected, less than 0: less."""
        num_tokens = entry.request.num_prompt_tokens + entry.merge.next_index
        self.forecast(entry.model).note_prefilled(entry.serial, report, num_tokens, now_s)
        return report.compute_s - entry.outlook.demand.prefill_s

    def note_complete(self, entry: RequestEntry, now_s: float) -> float:
        """Returns as `note_prefilled`, of decoding."""
        forecast, demand = self.forecast(entry.model), entry.outlook.demand
        num_output = entry.merge.next_index
        forecast.note_complete(entry.serial, entry.request, num_output, now_s)
        return forecast.decode_work_s(demand, num_output - demand.num_output_tokens)

    def note_over(self, entry: RequestEntry, now_s: float) -> None:
        """The current attempt of the request has come to its end."""
        found = self._forecasts.get(entry.model)
        if found is not None:
            found.note_over(entry.serial, now_s)
