"""When a failed attempt is repeated, how soon, and with what. No clock, no loop."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from kvrelay.client import ClientConfig, FinishReason, RequestReport, SamplingParams
from kvrelay.client.request_progress import RequestProgress, retry_pause_s
from kvrelay.core.client_types import CallFinished, GenerateCall
from kvrelay.core.errors import (
    DuplicateRequest,
    InvalidRequest,
    KVRelayError,
    NodeUnavailable,
    Overloaded,
    RouterUnavailable,
)
from kvrelay.core.request import TokenRequest
from kvrelay.core.service_terms import Priority, ServiceTerms

LOST = NodeUnavailable("lost")


def progress(
    timeout_s: float | None = None, max_tokens: int = 100, ttft_timeout_s: float | None = None
) -> RequestProgress:
    terms = ServiceTerms(Priority.LOW, "ada", ttft_timeout_s)
    request = TokenRequest((1, 2), 2, SamplingParams(max_tokens=max_tokens))
    return RequestProgress(GenerateCall("r", "m", request, timeout_s, terms), started_s=100.0)


def fail(request: RequestProgress, config: ClientConfig, **changes: Any) -> float:
    options = {"error": LOST, "now_s": 100.0, "may_switch": False, **changes}
    error, now_s = options["error"], options["now_s"]
    return request.pause_before_retry_s(error, config, Random(1), now_s, may_switch=options["may_switch"])


def test_the_pause_doubles_with_jitter_up_to_its_bound() -> None:
    config = ClientConfig(backoff_base_s=1.0, backoff_max_s=5.0)
    for num_earlier, whole_s in enumerate([1.0, 2.0, 4.0, 5.0, 5.0]):
        pauses = {retry_pause_s(num_earlier, LOST, config, Random(seed)) for seed in range(50)}
        assert whole_s / 2 <= min(pauses) < max(pauses) <= whole_s
        assert len(pauses) > 10


def test_the_pause_is_never_shorter_than_the_router_asked_for_nor_endless() -> None:
    config = ClientConfig()
    assert retry_pause_s(0, Overloaded("full", retry_after_s=7.0), config, Random(1)) == 7.0
    assert retry_pause_s(0, Overloaded("full", retry_after_s=1e9), config, Random(1)) == 60.0


def test_another_router_is_asked_at_once_but_only_the_first_time() -> None:
    request, config = progress(), ClientConfig()
    assert fail(request, config, may_switch=True) == 0.0
    assert fail(request, config, may_switch=True) > 0.0


def test_new_tokens_make_up_for_earlier_failures() -> None:
    request, config = progress(), ClientConfig(max_retries=2)
    for _ in range(3):
        fail(request, config)
        fail(request, config)
        request.take([7], (), [101.0])
    assert (request.num_retries, request.num_continuations) == (2, 4)
    fail(request, config)
    fail(request, config)
    with pytest.raises(NodeUnavailable):
        fail(request, config)


def test_continuations_are_bounded_even_with_progress_between_them() -> None:
    request, config = progress(), ClientConfig(max_continuations=3)
    for token in range(3):
        request.take([token], (), [101.0])
        fail(request, config)
    request.take([9], (), [101.0])
    with pytest.raises(NodeUnavailable):
        fail(request, config)


def test_a_leftover_of_an_own_attempt_is_no_fault_of_the_caller() -> None:
    """Seed 1071 of the fault simulation: the last retry met what the lost session had left at the router."""
    request, config = progress(), ClientConfig(max_retries=1)
    leftover = DuplicateRequest("request_id 'r' is in use", field="request_id")
    request.next_call(100.0)
    request.next_call(100.0)
    assert fail(request, config, error=leftover) > 0.0
    with pytest.raises(RouterUnavailable, match="still has an earlier attempt"):
        fail(request, config, error=leftover)


def test_what_can_not_be_repeated_raises_itself() -> None:
    error = InvalidRequest("bad", field="model")
    with pytest.raises(InvalidRequest) as caught:
        fail(progress(), ClientConfig(), error=error)
    assert caught.value is error


def test_each_attempt_asks_for_what_is_left_in_the_time_that_is_left() -> None:
    request = progress(timeout_s=10.0)
    assert request.next_call(101.0).timeout_s == 9.0
    request.take([5, 6], (), [102.0, 102.0])
    call = request.next_call(108.0)
    assert (call.request.token_ids, call.request.num_prompt_tokens) == ((1, 2, 5, 6), 2)
    assert (call.request_id, call.model, call.timeout_s) == ("r", "m", 2.0)
    assert request.next_call(1000.0).timeout_s == 0.001
    assert progress().next_call(101.0).timeout_s is None


def test_the_first_token_is_asked_for_in_the_time_that_is_left_and_only_until_it_has_come() -> None:
    request = progress(ttft_timeout_s=2.0)
    assert request.next_call(100.5).terms == ServiceTerms(Priority.LOW, "ada", 1.5)
    assert request.next_call(103.0).terms.ttft_timeout_s == 0.001
    request.take([5], (), [101.0])
    assert request.next_call(101.0).terms == ServiceTerms(Priority.LOW, "ada", None)


def test_no_attempt_is_made_that_would_be_too_late_for_the_first_token() -> None:
    error = Overloaded("full", retry_after_s=3.0)
    with pytest.raises(Overloaded):
        fail(progress(ttft_timeout_s=2.0), ClientConfig(), error=error, may_switch=False)
    begun = progress(ttft_timeout_s=2.0)
    begun.take([5], (), [101.0])
    assert fail(begun, ClientConfig(), error=error, may_switch=False) >= 3.0


def test_an_end_is_believed_only_if_all_tokens_came() -> None:
    def finished(num_tokens: int) -> CallFinished:
        report = RequestReport("p", "d", 1, 2, num_tokens, 0, 0.0, 0.0, 0.0, 0, 0, 0.0, "")
        return CallFinished(FinishReason.STOP, report)

    request = progress()
    assert request.check_complete(finished(0)) is not None
    request.take([5, 6], (), [101.0, 101.0])
    assert request.check_complete(finished(2)) is None
    for wrong in (1, 3):
        fault = request.check_complete(finished(wrong))
        assert fault is not None
        assert fault.retryable


def test_no_more_than_max_tokens_are_taken() -> None:
    request = progress(max_tokens=2)
    request.take([1, 2], (), [1.0, 1.0])
    with pytest.raises(KVRelayError, match="max_tokens"):
        request.take([3], (), [1.0])
    assert request.token_ids == [1, 2]
