"""Odd paths and bodies: answered or refused in OpenAI's shape, and never a bug of the proxy's."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from kvrelay.core.request import FinishReason

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}


@pytest.fixture(autouse=True)
def _answers(router: Any) -> None:
    async def script(call: Any) -> None:
        await call.tokens(1)
        await call.finish(FinishReason.STOP)

    router.script = script


def check_error(response: httpx.Response) -> None:
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/tiny", 200),
        ("GET", "/v1/models/other/one", 404),
        ("GET", "/v1/models/%ff%00", 404),
    ],
)
async def test_paths_that_lead_nowhere_are_errors_of_the_usual_shape(
    start_proxy: Any, method: str, path: str, status: int
) -> None:
    response = await (await start_proxy()).request(method, path)
    assert response.status_code == status
    if status >= 400:
        check_error(response)


DEEP = 900
ODD_BODIES = {
    "nothing": b"",
    "not JSON": b"{",
    "not UTF-8": b'{"model": "\xff"}',
    "a list": b"[]",
    "a huge number": b'{"seed": ' + b"9" * 5000 + b"}",
    "NaN": json.dumps({**CHAT, "temperature": float("nan")}).encode(),
    "an infinite bias": json.dumps({**CHAT, "logit_bias": {"1": float("inf")}}).encode(),
    "too deep to read": b"[" * 100_000,
    "deep tools": json.dumps(
        {**CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}
    )
    .replace('"parameters": {}', '"parameters": ' + '{"a": ' * DEEP + "1" + "}" * DEEP)
    .encode(),
    "a deep schema": json.dumps(CHAT)[:-1].encode()
    + b', "structured_outputs": {"json": '
    + b'{"a": ' * DEEP
    + b"1"
    + b"}" * DEEP
    + b"}}",
    **{
        f"a lone surrogate in {name}": json.dumps({**CHAT, **fields}).encode()
        for name, fields in {
            "model": {"model": "\ud800"},
            "content": {"messages": [{"role": "user", "content": "\ud800"}]},
            "stop": {"stop": "\ud800"},
            "cache_salt": {"cache_salt": "\ud800"},
            "user": {"user": "\ud800"},
            "a field": {"\ud800": 1},
            "logit_bias": {"logit_bias": {"\ud800": 1}},
            "a name": {"messages": [{"role": "user", "content": "a", "name": "\ud800"}]},
            "template variables": {"chat_template_kwargs": {"\ud800": "\ud800"}},
            "a grammar": {"structured_outputs": {"regex": "\ud800"}},
            "a schema": {"structured_outputs": {"json": {"a": "\ud800"}}},
            "a tool": {"tools": [{"type": "function", "function": {"name": "f", "description": "\ud800"}}]},
        }.items()
    },
}


@pytest.mark.parametrize("body", ODD_BODIES.values(), ids=ODD_BODIES)
async def test_an_odd_body_is_answered_or_refused_and_never_a_bug(start_proxy: Any, body: bytes) -> None:
    proxy = await start_proxy()
    response = await proxy.post("/v1/chat/completions", content=body)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        check_error(response)
    json.loads(response.content)
