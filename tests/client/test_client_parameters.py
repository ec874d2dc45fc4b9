"""Every bad parameter is refused before anything is sent, and its field is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvrelay.client import AsyncClient, Client, ClientConfig, SamplingParams
from kvrelay.client.addresses import RouterRotation, parse_addresses
from kvrelay.client.config import default_cache_dir
from kvrelay.core.errors import ConfigError, ContextLengthExceeded, InvalidRequest, UnknownModel

BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": [1], "messages": [{"role": "user", "content": "hi"}]}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": b"bytes"}, "prompt"),
    ({"prompt": [1, -1]}, "prompt"),
    ({"prompt": [1, 2**31]}, "prompt"),
    ({"prompt": [1, "2"]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": "lone \ud800 surrogate"}, "prompt"),
    ({"prompt": [1], "chat": True}, "chat"),
    ({"messages": []}, "messages"),
    ({"messages": 5}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}, "messages[1].content"),
    ({"messages": [{"content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": ["part"]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "\udc00"}]}, "messages[0].content"),
    ({"prompt": [1], "model": 3}, "model"),
    ({"prompt": [1], "model": "m" * 257}, "model"),
    ({"prompt": [1], "model": "a\nb"}, "model"),
    ({"prompt": [1], "request_id": "r" * 129}, "request_id"),
    ({"prompt": [1], "request_id": "a\x00"}, "request_id"),
    ({"prompt": [1], "request_id": 12}, "request_id"),
    ({"prompt": [1], "timeout_s": 0}, "timeout_s"),
    ({"prompt": [1], "timeout_s": -1.0}, "timeout_s"),
    ({"prompt": [1], "timeout_s": float("nan")}, "timeout_s"),
    ({"prompt": [1], "timeout_s": float("inf")}, "timeout_s"),
    ({"prompt": [1], "timeout_s": 1e9}, "timeout_s"),
    ({"prompt": [1], "timeout_s": "5"}, "timeout_s"),
    ({"prompt": [1], "ttft_timeout_s": 0}, "ttft_timeout_s"),
    ({"prompt": [1], "ttft_timeout_s": True}, "ttft_timeout_s"),
    ({"prompt": [1], "priority": "urgent"}, "priority"),
    ({"prompt": [1], "priority": 1}, "priority"),
    ({"prompt": [1], "tenant": "x" * 129}, "tenant"),
    ({"prompt": [1], "tenant": None}, "tenant"),
    ({"prompt": [1], "cache_salt": "text"}, "cache_salt"),
    ({"prompt": [1], "cache_salt": b"x" * 257}, "cache_salt"),
    ({"prompt": [1], "sampling": {"max_tokens": 5}}, "sampling"),
]


@pytest.mark.parametrize(("arguments", "field"), BAD_ARGUMENTS, ids=lambda value: str(value)[:40])
async def test_a_bad_argument_names_its_field_and_sends_nothing(
    client: AsyncClient, router: Any, arguments: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate(**arguments)
    assert caught.value.field == field
    assert field.partition("[")[0] in caught.value.message
    with pytest.raises(InvalidRequest):
        await client.complete(**arguments)
    assert router.num_sessions == 0


@pytest.mark.parametrize(
    ("prompt", "unit"), [([1] * 500_001, "tokens"), ("x" * ((16 << 20) + 1), "characters")]
)
async def test_a_monstrous_prompt_is_refused(client: AsyncClient, prompt: Any, unit: str) -> None:
    with pytest.raises(ContextLengthExceeded, match=unit) as caught:
        client.generate(prompt)
    assert caught.value.field == "prompt"


async def test_sampling_is_checked_when_it_is_made() -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(top_p=1.5)
    assert caught.value.field == "sampling.top_p"


async def test_an_unknown_model_is_named_with_those_that_are_served(client: AsyncClient) -> None:
    for ask in (client.complete([1], model="other"), client.tokenizer("other")):
        with pytest.raises(UnknownModel, match=r"'other'.*'tiny'") as caught:
            await ask
        assert caught.value.field == "model"


async def test_the_model_must_be_given_where_several_are_served(
    client: AsyncClient, router: Any, make_model: Any
) -> None:
    router.models = (make_model(name="a"), make_model(name="b"))
    with pytest.raises(InvalidRequest, match=r"'a', 'b'") as caught:
        await client.complete([1])
    assert caught.value.field == "model"


@pytest.mark.parametrize("interval_s", [-1.0, 0.01, 1e6, float("nan")])
async def test_a_bad_watch_interval_is_refused(client: AsyncClient, interval_s: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await anext(client.watch_cluster(interval_s))
    assert caught.value.field == "interval_s"


@pytest.mark.parametrize(
    "addresses",
    ["", [], "http://host:1", "host:0", "host:65536", "host:x", "a b", ["ok", ""], "::1", [7070], "h:1/x"],
)
def test_bad_addresses_are_refused(addresses: Any) -> None:
    for kind in (AsyncClient, Client):
        with pytest.raises(ConfigError, match="addresses") as caught:
            kind(addresses)
        assert caught.value.field == "addresses"


def test_addresses_may_be_written_as_people_do() -> None:
    assert parse_addresses(" a , b:80,[::1]:90 ,[fe80::1], a:7070") == (
        "a:7070",
        "b:80",
        "[::1]:90",
        "[fe80::1]:7070",
    )
    assert parse_addresses(["10.0.0.1:1"]) == ("10.0.0.1:1",)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("connect_timeout_s", 0),
        ("call_timeout_s", float("inf")),
        ("backoff_base_s", "1"),
        ("max_retries", -1),
        ("max_retries", 1.5),
        ("max_buffered_tokens", 0),
        ("max_requests_in_flight", True),
    ],
)
def test_a_bad_setting_is_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        ClientConfig(**{field: value})
    assert caught.value.field == field


def test_all_bad_settings_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"connect_timeout_s(.|\n)*max_tokenizers"):
        ClientConfig(connect_timeout_s=-1, max_tokenizers=0)


def test_the_cache_folder_follows_the_environment() -> None:
    xdg = {"XDG_CACHE_HOME": "/xdg"}
    assert default_cache_dir({"KVRELAY_CACHE": "/own", **xdg}) == Path("/own/tokenizers")
    assert default_cache_dir(xdg) == Path("/xdg/kvrelay/tokenizers")
    assert default_cache_dir({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache/kvrelay/tokenizers"


class TestRouterRotation:
    def rotation(self) -> RouterRotation:
        class First:
            def randrange(self, stop: int) -> int:
                return 0

        return RouterRotation(("a", "b", "c"), First(), 1.0, 4.0)  # type: ignore[arg-type]

    def test_each_comes_first_in_turn(self) -> None:
        rotation = self.rotation()
        assert [rotation.order(0.0) for _ in range(4)] == [
            ("a", "b", "c"),
            ("b", "c", "a"),
            ("c", "a", "b"),
            ("a", "b", "c"),
        ]

    def test_a_failed_one_comes_last_until_its_pause_is_over(self) -> None:
        rotation = self.rotation()
        rotation.mark_failed("a", 0.0)
        assert rotation.order(0.5) == ("b", "c", "a")
        assert rotation.order(0.5)[-1] == "a"
        rotation.order(0.5)
        assert rotation.order(1.0)[0] == "a"

    def test_the_pause_doubles_up_to_its_bound_and_ends_with_success(self) -> None:
        rotation = self.rotation()
        now_s = 0.0
        for pause_s in (1.0, 2.0, 4.0, 4.0):
            rotation.mark_failed("a", now_s)
            rotation.mark_failed("a", now_s)  # the same loss, seen by another request
            assert not self.is_well(rotation, now_s + pause_s * 0.99)
            now_s += pause_s
            assert self.is_well(rotation, now_s)
        rotation.mark_well("a")
        rotation.mark_failed("a", now_s)
        assert not self.is_well(rotation, now_s + 0.99)
        assert self.is_well(rotation, now_s + 1.0)

    @staticmethod
    def is_well(rotation: RouterRotation, now_s: float) -> bool:
        """Whether "a" comes first in its turn."""
        return any(rotation.order(now_s)[0] == "a" for _ in range(3))

    def test_the_one_just_lost_is_not_asked_first_again(self) -> None:
        rotation = self.rotation()
        assert rotation.order(0.0, last="a") == ("b", "c", "a")
