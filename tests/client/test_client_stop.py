"""A stop string at a router: the request is finished there, and its report comes with the result."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvrelay.client import AsyncClient, ClientConfig, FinishReason, SamplingParams
from kvrelay.core.client_types import SessionUpdate
from kvrelay.core.errors import InvalidRequest, NodeUnavailable, RequestCancelled
from kvrelay.core.request import TokenLogprobs

SAMPLING = SamplingParams(max_tokens=100)
NO_TOKENS_MISS = {"sampling": SAMPLING, "stop": ["dog"]}


@pytest.fixture
def encode(byte_level_tokenizer: Any) -> Any:
    return lambda text: byte_level_tokenizer.encode(text).ids


async def test_a_match_finishes_the_request_and_brings_the_routers_report(
    client: AsyncClient, text_router: Any, encode: Any
) -> None:
    async def script(call: Any) -> None:
        for token_id in encode("the lazy dog"):
            await call.tokens(token_id)
        await call.wait_satisfied()
        await call.finish(FinishReason.STOP)

    text_router.script = script
    stream = client.generate("x", **NO_TOKENS_MISS)
    assert "".join([chunk.text async for chunk in stream]) == "the lazy "
    result = stream.result
    assert (result.finish_reason, result.stop_text, result.text) == (FinishReason.STOP, "dog", "the lazy ")
    assert result.report.decode_node == "d0"
    assert not text_router.calls[0].cancelled.is_set()


async def test_tokens_of_one_message_behind_the_match_are_dropped(
    client: AsyncClient, text_router: Any, encode: Any
) -> None:
    wanted, late = encode("the dog"), encode(" jumps over")

    async def script(call: Any) -> None:
        await call.tokens(*wanted, *late)
        await call.tokens(*late)
        await call.wait_satisfied()
        await call.finish(FinishReason.STOP)

    text_router.script = script
    stream = client.generate("x", **NO_TOKENS_MISS, include_stop=True)
    chunks = [chunk async for chunk in stream]
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == wanted
    result = stream.result
    assert (list(result.token_ids), result.text) == (wanted, "the dog")
    assert len(result.itl_s) == len(wanted) - 1
    assert result.report.num_output_tokens == len(wanted) + 2 * len(late), "what the router delivered"


async def test_logprobs_go_with_the_tokens_that_are_kept(
    client: AsyncClient, text_router: Any, encode: Any
) -> None:
    token_ids = encode("a dog fox")

    async def script(call: Any) -> None:
        logprobs: list[TokenLogprobs | None] = [
            TokenLogprobs(-float(index), ()) for index in range(len(token_ids))
        ]
        await call.tokens(*token_ids, logprobs=logprobs)
        await call.wait_satisfied()
        await call.finish(FinishReason.STOP)

    text_router.script = script
    sampling = SamplingParams(max_tokens=100, num_logprobs=0)
    result = await client.complete("x", sampling=sampling, stop=["dog"])
    assert len(result.logprobs) == len(result.token_ids) < len(token_ids)


@pytest.mark.parametrize("how", ["with the match", "after the match"])
async def test_a_router_lost_once_the_text_is_whole_still_gives_the_result(
    client: AsyncClient, text_router: Any, encode: Any, how: str
) -> None:
    async def script(call: Any) -> None:
        token_ids, lost = encode("the dog"), NodeUnavailable("the decode node is gone")
        if how == "with the match":
            counts = [len(token_ids)]
            await call.send(
                SessionUpdate([call.stream_id], counts, token_ids, failed=[(call.stream_id, lost)])
            )
            return
        await call.tokens(*token_ids)
        await call.wait_satisfied()
        await call.fail(lost)

    text_router.script = script
    result = await client.complete("x", **NO_TOKENS_MISS)
    assert (result.text, result.stop_text, result.finish_reason) == ("the ", "dog", FinishReason.STOP)
    assert (result.report.decode_node, result.report.num_output_tokens) == ("", len(result.token_ids))
    assert len(text_router.calls) == 1, "a whole text is not asked for again"


async def test_a_killed_router_does_not_take_a_whole_text_away(
    client: AsyncClient, text_router: Any, encode: Any
) -> None:
    async def script(call: Any) -> None:
        await call.tokens(*encode("the dog"))
        await call.wait_satisfied()
        await text_router.kill()

    text_router.script = script
    result = await client.complete("x", **NO_TOKENS_MISS)
    assert (result.text, result.report.num_prompt_tokens) == ("the ", 1)


async def test_a_stop_string_matches_across_a_change_of_routers(
    start_router: Any, text_router: Any, config: ClientConfig, bundle: bytes, encode: Any
) -> None:
    other = await start_router()
    other.models, other.bundles = text_router.models, text_router.bundles
    token_ids = encode("a <|stop|> b")

    async def script(call: Any) -> None:
        request = call.call.request
        rest = token_ids[request.num_output_tokens :]
        if len(rest) == len(token_ids):
            await call.tokens(*rest[:6])
            await call.fail(NodeUnavailable("gone in the middle of a stop string"))
            return
        await call.tokens(*rest)
        await call.wait_satisfied()
        await call.finish(FinishReason.STOP)

    text_router.script = other.script = script
    async with AsyncClient([text_router.address, other.address], config=config) as client:
        stream = client.generate("x", sampling=SAMPLING, stop=["<|stop|>"])
        texts = [chunk.text async for chunk in stream]
    assert "".join(texts) == "a " == stream.result.text
    assert stream.result.num_continuations == 1
    assert stream.result.stop_text == "<|stop|>"


async def test_a_match_in_the_last_token_needs_no_finish(
    client: AsyncClient, text_router: Any, encode: Any
) -> None:
    async def script(call: Any) -> None:
        await call.tokens(*encode("a dog"))
        await call.finish(FinishReason.LENGTH)

    text_router.script = script
    result = await client.complete("x", **NO_TOKENS_MISS)
    assert (result.text, result.finish_reason, result.report.prefill_node) == ("a ", FinishReason.STOP, "p0")


async def test_an_end_of_text_that_only_began_a_stop_string_is_shown(
    client: AsyncClient, text_router: Any, encode: Any
) -> None:
    async def script(call: Any) -> None:
        await call.tokens(*encode("a do"))
        await call.finish(FinishReason.LENGTH)

    text_router.script = script
    result = await client.complete("x", **NO_TOKENS_MISS)
    assert (result.text, result.stop_text, result.finish_reason) == ("a do", None, FinishReason.LENGTH)


async def test_a_request_cancelled_while_it_waits_for_its_report_is_cancelled(
    client: AsyncClient, text_router: Any, encode: Any
) -> None:
    async def script(call: Any) -> None:
        await call.tokens(*encode("a dog"))
        await call.cancelled.wait()

    text_router.script = script
    stream = client.generate("x", **NO_TOKENS_MISS)

    async def read() -> None:
        async for _ in stream:
            pass

    reading = asyncio.create_task(read())
    await text_router.wait_calls(1)
    await text_router.calls[0].wait_satisfied()
    stream.cancel()
    with pytest.raises(RequestCancelled):
        await reading


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"stop": "dog"}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": [5]}, "stop[0]"),
        ({"stop": ["x" * 1025]}, "stop[0]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a"], "decode_text": False}, "stop"),
        ({"stop": b"a"}, "stop"),
        ({"tools": 5}, "tools"),
        ({"tools": b"x"}, "tools"),
    ],
)
def test_a_stop_or_tools_that_can_not_be_served_is_named(
    client: AsyncClient, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate("x", **options)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("hi", "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "messages[1].role"),
        ([{"role": "assistant", "content": 5, "tool_calls": [{}]}], "messages[0].content"),
        ([{"role": "assistant", "tool_calls": []}], "messages[0].content"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content"),
    ],
)
def test_messages_that_can_not_be_shown_to_a_model_are_named(
    client: AsyncClient, messages: Any, field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate(messages=messages)
    assert caught.value.field == field


def test_a_turn_of_tool_calls_needs_no_words(client: AsyncClient) -> None:
    client.generate(messages=[{"role": "assistant", "tool_calls": [{"id": "1"}]}])
