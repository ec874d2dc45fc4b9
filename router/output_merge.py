"""One request's output: what was delivered of it, and which attempt's tokens come next."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from kvrelay.core.ids import AttemptId
from kvrelay.core.request import TokenLogprobs
from kvrelay.router.events import DeliverTokens, SessionId

if TYPE_CHECKING:
    from kvrelay.router.steady_run import SteadyRun

NO_ATTEMPT: Final = AttemptId(0)
MAX_TOKEN_ID: Final = 2**31 - 1

Logprobs = Sequence[TokenLogprobs | None]


@dataclass(slots=True, eq=False)
class OutputMerge:
    """One request's output so far, and what it waits for.

    `attempt` is the one whose tokens count; `flowing` equals it as soon as its first token is in, which is
    when its decode node's tokens go straight through. While that node's rows stay the same, a `SteadyRun`
    delivers them and writes them here later: `steady_run` is set, and ends before anything else changes.
    """

    session: SessionId
    stream_id: int
    first_index: int
    max_tokens: int
    max_early_tokens: int
    attempt: AttemptId = NO_ATTEMPT
    flowing: AttemptId = NO_ATTEMPT
    first_token_s: float | None = None
    attempt_first_token_s: float | None = None
    """When the latest attempt's first token came; it outlasts that attempt."""
    early_tokens: list[int] = field(default_factory=list)
    early_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    steady_run: SteadyRun | None = None
    written: array[int] = field(default_factory=lambda: array("i"))
    """The tokens delivered by this router, less those that `steady_run` has yet to write."""

    @property
    def tokens(self) -> array[int]:
        """Those delivered by this router."""
        if self.steady_run is not None:
            self.steady_run.settle()
        return self.written

    @property
    def next_index(self) -> int:
        """The output index that comes next."""
        return self.first_index + len(self.tokens)

    def end_steady_run(self) -> None:
        """From now on this output's tokens are looked at one by one again, and those of its run's others."""
        if self.steady_run is not None:
            self.steady_run.end()

    def start_attempt(self, attempt: AttemptId) -> None:
        """From now on only this attempt's tokens count (`NO_ATTEMPT`: nobody's)."""
        self.end_steady_run()
        self.attempt = attempt
        self.flowing = NO_ATTEMPT
        if attempt != NO_ATTEMPT:
            self.attempt_first_token_s = None
        self.early_tokens.clear()
        self.early_logprobs.clear()

    def offer(
        self,
        first_index: int,
        token_ids: Sequence[int],
        logprobs: Logprobs,
        out: DeliverTokens,
        now_s: float,
    ) -> str:
        """Take tokens of the current attempt; what can be delivered is appended to `out`.

        Mutates this merge and `out`. Returns what is wrong with them, or an empty string.
        """
        num_known = self.next_index - first_index
        if num_known >= len(token_ids):
            return ""
        if num_known < 0:
            return self._keep_early(first_index, token_ids, logprobs)
        if self.first_token_s is None:
            self.first_token_s = now_s
        fault = self._deliver(token_ids[num_known:], logprobs[num_known:], out)
        if self.flowing != self.attempt:
            self.flowing, self.attempt_first_token_s = self.attempt, now_s
        if not fault and self.early_tokens:
            early_tokens, early_logprobs = self.early_tokens, self.early_logprobs
            self.early_tokens, self.early_logprobs = [], []
            # The early ones follow the attempt's first token, whichever node it came from.
            skip = max(0, len(token_ids) - num_known - 1)
            fault = self._deliver(early_tokens[skip:], early_logprobs[skip:], out)
        return fault

    def _deliver(self, token_ids: Sequence[int], logprobs: Logprobs, out: DeliverTokens) -> str:
        self.end_steady_run()
        room = self.max_tokens - self.next_index
        accepted = token_ids[:room]
        if accepted:
            self.written.extend(accepted)
            _append(out, self.stream_id, accepted, logprobs[:room])
        if len(token_ids) > room:
            return f"it went on after max_tokens ({self.max_tokens})"
        return ""

    def _keep_early(self, first_index: int, token_ids: Sequence[int], logprobs: Logprobs) -> str:
        if self.flowing == self.attempt:
            return f"it skipped from output token {self.next_index} to {first_index}"
        expected = self.next_index + 1 + len(self.early_tokens)
        if first_index > expected:
            return f"it skipped from output token {expected} to {first_index}"
        fresh = token_ids[expected - first_index :]
        if len(self.early_tokens) + len(fresh) > self.max_early_tokens:
            return f"it is more than {self.max_early_tokens} tokens ahead of the prefill node's first"
        self.early_tokens.extend(fresh)
        self.early_logprobs.extend(logprobs[expected - first_index :] or [None] * len(fresh))
        return ""


def _append(out: DeliverTokens, stream_id: int, token_ids: Sequence[int], logprobs: Logprobs) -> None:
    if logprobs or out.logprobs:
        # One column for all: those without get None.
        out.logprobs.extend([None] * (len(out.token_ids) - len(out.logprobs)))
        out.logprobs.extend(logprobs or [None] * len(token_ids))
    out.stream_ids.append(stream_id)
    out.counts.append(len(token_ids))
    out.token_ids.extend(token_ids)
