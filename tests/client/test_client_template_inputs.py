"""What goes to a chat template beside the messages, and what is wrong with it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvrelay.client import AsyncClient, Client, ClientConfig, FinishReason, ModelTokenizer, SamplingParams
from kvrelay.core.errors import InvalidRequest

MESSAGES = [{"role": "user", "content": "hi"}]
ONE_TOKEN = SamplingParams(max_tokens=1)
TEMPLATE = (
    "{{ messages[0].content }}{{ tools | tojson }}{{ mood }}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def nested(depth: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.fixture
def template_router(router: Any, byte_level_tokenizer: Any, make_bundle: Any, make_model: Any) -> Any:
    bundle = make_bundle(byte_level_tokenizer, TEMPLATE)
    router.models, router.bundles = (make_model(bundle),), {"tiny": bundle}
    return router


async def test_generate_and_tokenize_chat_show_the_same_prompt(
    client: AsyncClient, template_router: Any, byte_level_tokenizer: Any
) -> None:
    options: dict[str, Any] = {
        "tools": [{"name": "f"}],
        "template_variables": {"mood": "glad"},
        "add_generation_prompt": False,
    }
    stream = client.generate(messages=MESSAGES, sampling=ONE_TOKEN, **options)
    assert stream.prompt_token_ids == ()
    async for _ in stream:
        pass
    asked = template_router.calls[0].call.request.token_ids
    assert byte_level_tokenizer.decode(list(asked), skip_special_tokens=False) == 'hi[{"name": "f"}]glad'
    assert asked == stream.prompt_token_ids == await client.tokenize_chat(MESSAGES, **options)


async def test_a_prompt_of_token_ids_is_shown_as_given(client: AsyncClient, template_router: Any) -> None:
    stream = client.generate([1, 2], sampling=SamplingParams(max_tokens=3))
    async for _ in stream:
        pass
    assert stream.prompt_token_ids == (1, 2)


async def test_the_blocking_client_has_both_too(template_router: Any, config: ClientConfig) -> None:
    def ask() -> tuple[Any, Any]:
        with Client(template_router.address, config=config) as client:
            stream = client.generate(messages=MESSAGES, sampling=ONE_TOKEN)
            assert list(stream)
            return stream.prompt_token_ids, client.tokenize_chat(MESSAGES)

    shown, tokenized = await asyncio.to_thread(ask)
    assert shown == tokenized != ()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tools": [{}, "f"]}, "tools[1]"),
        ({"tools": [{}] * 1025}, "tools"),
        ({"template_variables": ["mood"]}, "template_variables"),
        ({"template_variables": {1: "a"}}, "template_variables"),
    ],
)
async def test_a_bad_input_names_its_field(client: AsyncClient, options: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate(messages=MESSAGES, **options)
    assert caught.value.field == field
    with pytest.raises(InvalidRequest) as caught:
        await client.tokenize_chat(MESSAGES, **options)
    assert caught.value.field == field


@pytest.mark.parametrize("tool", [{"name": "\ud800"}, nested(100_000)], ids=["surrogate", "deep"])
async def test_what_can_not_be_written_down_is_the_callers_fault(
    client: AsyncClient, template_router: Any, tool: Any
) -> None:
    with pytest.raises(InvalidRequest, match="chat template") as caught:
        await client.tokenize_chat(MESSAGES, tools=[tool])
    assert caught.value.field == "messages"


async def test_stop_strings_need_a_tokenizer_and_say_so(client: AsyncClient, router: Any) -> None:
    with pytest.raises(InvalidRequest, match="no tokenizer") as caught:
        await client.complete([1], stop=["x"])
    assert caught.value.field == "stop"
    assert router.num_sessions == 0


@pytest.mark.parametrize(
    ("ignore_eos", "skip_special_tokens", "text"),
    [
        (True, False, "a<|im_end|>b"),
        (True, True, "ab"),
        (False, False, "ab"),
    ],
)
async def test_an_end_of_sequence_that_ends_nothing_is_a_special_token_like_others(
    bundle: bytes,
    client: AsyncClient,
    text_router: Any,
    ignore_eos: bool,
    skip_special_tokens: bool,
    text: str,
) -> None:
    tokenizer = ModelTokenizer(bundle)
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    (end,) = text_router.models[0].eos_token_ids

    async def script(call: Any) -> None:
        await call.tokens(a, end, b)
        await call.finish(FinishReason.LENGTH)

    text_router.script = script
    sampling = SamplingParams(max_tokens=3, ignore_eos=ignore_eos)
    result = await client.complete([1], sampling=sampling, skip_special_tokens=skip_special_tokens)
    assert result.text == text
