"""One request of a simulated client: what `Generation` does, and that what comes is the right answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from kvrelay.client.mailbox import AttemptEnd, AttemptFailed
from kvrelay.client.request_progress import RequestProgress
from kvrelay.core.client_types import CallFinished, GenerateCall
from kvrelay.core.errors import (
    DeadlineExceeded,
    DuplicateRequest,
    KVRelayError,
    RequestCancelled,
    RouterUnavailable,
)
from kvrelay.core.request import FinishReason, TokenLogprobs
from kvrelay.simulator.faults.world import Violation

if TYPE_CHECKING:
    from kvrelay.simulator.faults.client_process import ClientSession, SimClient

MAY_FAIL_BY: Final = frozenset(
    {
        "CANCELLED",
        "DEADLINE_EXCEEDED",
        "NODE_UNAVAILABLE",
        "ROUTER_UNAVAILABLE",
        "OVERLOADED",
        "TRANSFER_FAILED",
        "TRANSFER_TIMEOUT",
        "TRANSFER_CANCELLED",
        "TRANSFER_CORRUPT",
    }
)
"""What a request may end with while things break. An `ENGINE_FAILED` would be a broken contract."""


class ClientRequest:
    """`end` is how it ended: ``finished``, ``satisfied`` or an error's code; empty while it runs. `failures`
    are the codes of all its attempts that failed."""

    def __init__(
        self, client: SimClient, call: GenerateCall, answer: Sequence[int], reason: FinishReason
    ) -> None:
        self.name = call.request_id
        self.end = ""
        self.failures: set[str] = set()
        self.began_s = client.process.world.now_s
        self.progress = RequestProgress(call, client.process.now_s())
        self.answer = answer
        self.num_wanted: int | None = None
        """After so many tokens its caller is satisfied."""
        self._reason = reason
        self._client = client
        self._process = client.process
        self._session: ClientSession | None = None
        self._stream_id = 0
        self._router = ""
        self._is_router_well = False

    def begin(self) -> None:
        """Ask for it."""
        timeout_s = self.progress.call.timeout_s
        if timeout_s is not None:
            self._process.after(timeout_s, self._on_timeout)
        self._connect()

    def cancel(self) -> None:
        """Its caller wants no more."""
        self._finish_with(RequestCancelled("the request was cancelled by its caller"))

    def _on_timeout(self) -> None:
        self._finish_with(DeadlineExceeded("the request's timeout has passed"))

    def _connect(self) -> None:
        if not self.end:
            self._client.connect(self._router, self._submit, self._on_no_router)

    def _submit(self, session: ClientSession) -> None:
        if self.end:
            return
        self._router, self._session = session.address, session
        self._is_router_well = False
        self._stream_id = session.start(self.progress.next_call(self._process.now_s()), self)
        self._client.world.say(
            self._process.name,
            f"asks {self._router} for {self.name} from token {len(self.progress.token_ids)}",
        )

    def _on_no_router(self, error: RouterUnavailable) -> None:
        if not self.end:
            self._recover(AttemptFailed(error))

    def on_tokens(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> None:
        """They must be the next ones of the answer, with logprobs where those were asked for."""
        progress = self.progress
        start = len(progress.token_ids)
        if tuple(tokens) != tuple(self.answer[start : start + len(tokens)]):
            raise Violation(
                f"{self.name} got {list(tokens)} as tokens from {start}, of the answer"
                f" {list(self.answer[start : start + len(tokens) + 1])}"
            )
        wants_logprobs = progress.call.request.sampling.num_logprobs is not None
        if wants_logprobs and (len(logprobs) != len(tokens) or None in logprobs):
            raise Violation(f"{self.name} got {len(tokens)} tokens with the logprobs {logprobs}")
        now_s = self._process.now_s()
        progress.take(tokens, logprobs, [now_s] * len(tokens))
        if not self._is_router_well:
            self._is_router_well = True
            self._client.rotation.mark_well(self._router)
        if self.num_wanted is not None and len(progress.token_ids) >= self.num_wanted:
            assert self._session is not None
            self._session.finish(self._stream_id)

    def on_end(self, end: AttemptEnd) -> None:
        """The attempt has ended."""
        self._session = None
        if self.end:
            return
        if isinstance(end, CallFinished):
            self._on_finished(end)
        else:
            self._recover(end)

    def _on_finished(self, finished: CallFinished) -> None:
        if (fault := self.progress.check_complete(finished)) is not None:
            raise Violation(f"{self.name}: {fault.message}")
        num_tokens = len(self.progress.token_ids)
        if self.num_wanted is not None and num_tokens >= self.num_wanted:
            self._end("satisfied")
        elif num_tokens < len(self.answer) or finished.finish_reason is not self._reason:
            raise Violation(
                f"{self.name} finished by {finished.finish_reason} with {num_tokens} of {len(self.answer)}"
                f" tokens; {self._reason} is right"
            )
        else:
            self._end("finished")

    def _recover(self, failure: AttemptFailed) -> None:
        client, progress = self._client, self.progress
        now_s = self._process.now_s()
        self.failures.add(failure.error.code)
        if failure.lost_router:
            client.rotation.mark_failed(self._router, now_s)
        may_switch = failure.lost_router and len(client.addresses) > 1
        try:
            pause_s = progress.pause_before_retry_s(
                failure.error, client.config, client.world.rng, now_s, may_switch=may_switch
            )
        except KVRelayError as error:
            self._finish_with(error)
            return
        if isinstance(failure.error, DuplicateRequest):
            client.cancel_leftover(self._router, self.name)
        client.world.say(self._process.name, f"{self.name} failed ({failure.error.code}), again")
        self._process.after(pause_s, self._connect)

    def _finish_with(self, error: KVRelayError) -> None:
        if self.end:
            return
        if error.code not in MAY_FAIL_BY:
            raise Violation(f"{self.name} failed by {error.code}: {error.message}")
        session, self._session = self._session, None
        if session is not None:
            session.cancel(self._stream_id)
        self._end(error.code)
        self.last_error = error.message

    def _end(self, how: str) -> None:
        self.end = how
        self._client.world.say(self._process.name, f"{self.name} ended: {how}")
