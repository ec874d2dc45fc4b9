"""What every request passes on its way in and out: limits, ids, keys, disconnects, errors in mid-stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from kvrelay.core.errors import DeadlineExceeded, Overloaded
from kvrelay.core.request import FinishReason
from kvrelay.openai_proxy.access import ApiKey, hash_key

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
PATHS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "tiny", "prompt": "hi", "max_tokens": 8},
    "/v1/responses": {"model": "tiny", "input": "hi", "max_output_tokens": 8},
}


async def say_ok(call: Any) -> None:
    """The answer "ok"."""
    await call.tokens(*(ord(char) - 33 for char in "ok"))
    await call.finish(FinishReason.STOP)


async def hang(call: Any) -> None:
    """One token, then nothing until the request is cancelled."""
    await call.tokens(1)
    await call.cancelled.wait()


async def hang_at_once(call: Any) -> None:
    await call.cancelled.wait()


@pytest.fixture(autouse=True)
def _answers(router: Any) -> None:
    router.script = say_ok


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which has all four of its members."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


@pytest.mark.parametrize("path", PATHS)
async def test_every_endpoint_answers_in_one_piece_and_as_a_stream(start_proxy: Any, path: str) -> None:
    proxy = await start_proxy()
    whole = await proxy.post(path, json=PATHS[path])
    assert whole.status_code == 200
    assert '"ok"' in whole.text
    streamed = await proxy.post(path, json={**PATHS[path], "stream": True})
    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert '"ok"' in streamed.text


# ---- size


@pytest.mark.parametrize("has_length", [True, False])
async def test_a_body_larger_than_allowed_is_413(start_proxy: Any, router: Any, has_length: bool) -> None:
    proxy = await start_proxy(max_body_bytes=2000)
    body = json.dumps({**CHAT, "user": "x" * 2000}).encode()

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 500):
            yield body[start : start + 500]

    response = await proxy.post("/v1/chat/completions", content=body if has_length else chunks())
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"
    assert response.headers["connection"] == "close"
    assert not router.calls
    figures = (await proxy.get("/metrics")).text
    assert ('kvrelay_proxy_requests_refused_total{status="413"} 1.0' in figures) == has_length
    assert (await proxy.post("/v1/chat/completions", json=CHAT)).status_code == 200


# ---- ids


async def test_a_given_request_id_goes_to_the_router_and_back(start_proxy: Any, router: Any) -> None:
    proxy = await start_proxy()
    response = await proxy.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "my-1"})
    assert response.headers["x-request-id"] == "my-1"
    assert response.json()["id"] == "chatcmpl-my-1"
    assert router.calls[0].call.request_id == "my-1"


@pytest.mark.parametrize("given", ["", "a b", "x" * 500, "é".encode("latin-1")])
async def test_a_request_id_that_can_not_be_used_is_replaced(start_proxy: Any, given: str | bytes) -> None:
    proxy = await start_proxy()
    response = await proxy.get("/v1/models", headers={"x-request-id": given})
    assert response.status_code == 200
    assert len(response.headers["x-request-id"]) == 32


async def test_refusals_carry_an_id_too(start_proxy: Any) -> None:
    proxy = await start_proxy(max_body_bytes=2000)
    for response in (await proxy.get("/nothing"), await proxy.post("/tokenize", content=b"x" * 3000)):
        assert response.headers["x-request-id"]


# ---- how many


async def test_more_requests_than_allowed_are_429_until_one_ends(start_proxy: Any, router: Any) -> None:
    router.script = hang
    proxy = await start_proxy(max_requests_in_flight=1)
    async with proxy.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}):
        await router.wait_calls(1)
        refused = await proxy.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert (await proxy.get("/health")).status_code == 200, "health and figures are always answered"
    await router.calls[0].wait_cancelled()
    router.script = say_ok
    async with asyncio.timeout(20):
        while (await proxy.post("/v1/chat/completions", json=CHAT)).status_code == 429:
            pass


async def test_a_key_is_asked_for_where_there_are_keys_and_limits_hold(start_proxy: Any, router: Any) -> None:
    router.script = hang
    key = {"authorization": "Bearer kvr-x"}
    proxy = await start_proxy(keys=[ApiKey("ada", hash_key("kvr-x"), max_concurrent=1, private_cache=True)])
    refused = await proxy.post("/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert error_of(refused)["type"] == "authentication_error"
    assert (await proxy.get("/health")).status_code == (await proxy.get("/metrics")).status_code == 200
    body = {**CHAT, "stream": True}
    async with proxy.stream("POST", "/v1/chat/completions", json=body, headers=key):
        await router.wait_calls(1)
        assert router.calls[0].call.request.cache_salt
        assert (await proxy.get("/v1/models", headers=key)).status_code == 429
    await router.calls[0].wait_cancelled()


TIERS = {"auto": "normal", "default": "normal", "flex": "low", "priority": "high"}


@pytest.mark.parametrize("tier", TIERS)
async def test_a_service_tier_is_a_priority(start_proxy: Any, router: Any, tier: str) -> None:
    router.script = say_ok
    proxy = await start_proxy(ttft_timeout_s=5.0)
    for path, body in PATHS.items():
        router.calls.clear()
        answer = await proxy.post(path, json={**body, "service_tier": tier})
        assert answer.status_code == 200, answer.text
        terms = router.calls[0].call.terms
        assert (terms.priority, terms.tenant) == (TIERS[tier], "")
        assert 0 < terms.ttft_timeout_s <= 5.0
    refused = await proxy.post("/v1/chat/completions", json={**CHAT, "service_tier": "scale"})
    assert error_of(refused)["param"] == "service_tier"


async def test_a_key_allows_its_priority_and_the_answer_says_the_tier(start_proxy: Any, router: Any) -> None:
    router.script = say_ok
    proxy = await start_proxy(keys=[ApiKey("ada", hash_key("kvr-x"), max_priority="low")])
    key = {"authorization": "Bearer kvr-x"}
    answer = await proxy.post("/v1/responses", json={"input": "hi", "service_tier": "priority"}, headers=key)
    assert answer.json()["service_tier"] == "flex"
    assert router.calls[0].call.terms.priority == "low"


async def test_the_tenant_is_the_headers_else_the_keys_else_the_users(start_proxy: Any, router: Any) -> None:
    router.script = say_ok
    key = {"authorization": "Bearer kvr-x"}
    with_keys = await start_proxy(keys=[ApiKey("ada", hash_key("kvr-x"))], tenant_header="X-Team")
    open_to_all = await start_proxy()
    chat = "/v1/chat/completions"
    await with_keys.post(chat, json={**CHAT, "user": "u1"}, headers={**key, "x-team": "blue"})
    await with_keys.post(chat, json={**CHAT, "user": "u1"}, headers=key)
    await open_to_all.post(chat, json={**CHAT, "user": "u1"}, headers={"x-team": "blue"})
    await open_to_all.post(chat, json={**CHAT, "user": "u" * 1000})
    tenants = [made.call.terms.tenant for made in router.calls]
    assert tenants[:3] == ["blue", "ada", "u1"]
    assert len(tenants[3]) == 64


# ---- disconnects


@pytest.mark.parametrize("path", PATHS)
async def test_a_reader_that_goes_in_mid_stream_cancels_its_request(
    start_proxy: Any, router: Any, path: str
) -> None:
    router.script = hang
    proxy = await start_proxy()
    async with proxy.stream("POST", path, json={**PATHS[path], "stream": True}) as response:
        async for _ in response.aiter_bytes():
            break
    await router.calls[0].wait_cancelled()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_reader_that_goes_before_the_first_token_cancels_its_request(
    start_proxy: Any, router: Any, path: str, stream: bool
) -> None:
    router.script = hang_at_once
    proxy = await start_proxy()
    asking = asyncio.create_task(proxy.post(path, json={**PATHS[path], "stream": stream}))
    await router.wait_calls(1)
    asking.cancel()
    await router.calls[0].wait_cancelled()


async def test_all_choices_of_a_reader_that_goes_are_cancelled(start_proxy: Any, router: Any) -> None:
    router.script = hang
    proxy = await start_proxy()
    async with proxy.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True, "n": 3}):
        await router.wait_calls(3)
    for call in router.calls:
        await call.wait_cancelled()


# ---- what the cluster says


async def test_a_cluster_that_is_full_is_429_with_its_retry_time(start_proxy: Any, router: Any) -> None:
    async def script(call: Any) -> None:
        await call.fail(Overloaded("the queue is full", retry_after_s=0.01))

    router.script = script
    proxy = await start_proxy()
    for stream in (False, True):
        response = await proxy.post("/v1/chat/completions", json={**CHAT, "stream": stream})
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert error_of(response)["message"] == "the queue is full"


@pytest.mark.parametrize("path", PATHS)
async def test_an_error_in_mid_stream_is_an_event_and_the_streams_end(
    start_proxy: Any, router: Any, path: str
) -> None:
    has_begun = asyncio.Event()

    async def script(call: Any) -> None:
        await call.tokens(1)
        await has_begun.wait()
        await call.fail(DeadlineExceeded("out of time"))

    router.script = script
    proxy = await start_proxy()
    written = ""
    async with proxy.stream("POST", path, json={**PATHS[path], "stream": True}) as response:
        assert response.status_code == 200
        async for part in response.aiter_text():
            written += part
            has_begun.set()
    value = json.loads(written.strip().split("\n\n")[-1].split("data: ")[1])
    error = value["response"]["error"] if path == "/v1/responses" else value["error"]
    assert (error["message"], error["code"]) == ("out of time", "deadline_exceeded")
    assert "[DONE]" not in written


async def test_health_is_503_without_nodes_and_without_a_router(start_proxy: Any, router: Any) -> None:
    models = router.models
    router.models = ()
    proxy = await start_proxy()
    response = await proxy.get("/health")
    assert response.status_code == 503
    assert "nodes" in response.json()["reason"]
    router.models = models
    assert (await proxy.get("/health")).json() == {"status": "ok", "models": ["tiny"]}
    await router.kill()
    assert (await proxy.get("/health")).status_code == 503
