"""API keys: who is refused, whose limits are reached, and how the SDK comes back by itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from openai import AuthenticationError, OpenAI, RateLimitError

from tests.openai_proxy.running_services import RunningUp, running_proxy

from .conftest import greedy


@pytest.fixture(scope="module")
def guarded(up: RunningUp, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A proxy that asks for keys, in front of the same router: its base URL and the keys by name."""
    folder = tmp_path_factory.mktemp("guarded")
    file = folder / "keys.toml"
    limits = {"free": [], "one": ["--max-concurrent", "1"], "frugal": ["--tokens-per-minute", "1"]}
    limits |= {"private": ["--private-cache"], "too": ["--private-cache"]}
    keys = {name: _add_key(file, name, *flags) for name, flags in limits.items()}
    with running_proxy(folder / "proxy.log", up.router, "--keys-file", str(file)) as base_url:
        yield base_url, keys


def _add_key(file: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "kvrelay.cli", "keys", "add", str(file), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def client_of(guarded: tuple[str, dict[str, str]]) -> Iterator[Callable[[str], OpenAI]]:
    """A client with the key of that name, or with that text as its key."""
    base_url, keys = guarded
    made: list[OpenAI] = []

    def make(name: str) -> OpenAI:
        made.append(OpenAI(base_url=base_url, api_key=keys.get(name, name), max_retries=0, timeout=300))
        return made[-1]

    yield make
    for client in made:
        client.close()


def test_an_unknown_key_is_refused_and_a_known_one_is_not(
    client_of: Callable[[str], OpenAI], model: str
) -> None:
    for text in ("kvr-wrong", "x"):
        with pytest.raises(AuthenticationError) as refused:
            client_of(text).models.list()
        assert refused.value.code == "invalid_api_key"
        with pytest.raises(AuthenticationError):
            client_of(text).chat.completions.create(stream=True, **greedy(model))
    assert client_of("free").chat.completions.create(**greedy(model, max_tokens=1)).choices


def test_a_key_at_its_limit_of_requests_is_told_when_to_come_back(
    client_of: Callable[[str], OpenAI], model: str
) -> None:
    client = client_of("one")
    endless = greedy(model, max_tokens=4000, extra_body={"ignore_eos": True})
    with client.chat.completions.create(stream=True, **endless) as stream:
        next(iter(stream))
        with pytest.raises(RateLimitError) as refused:
            client.chat.completions.create(**greedy(model, max_tokens=1))
        assert refused.value.code == "rate_limit_exceeded"
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert "'one'" in refused.value.message
        assert client_of("free").chat.completions.create(**greedy(model, max_tokens=1)).choices
    patient = client.with_options(max_retries=20)
    assert patient.chat.completions.create(**greedy(model, max_tokens=1)).choices


def test_a_key_that_has_used_its_minutes_tokens_is_told_when_to_come_back(
    client_of: Callable[[str], OpenAI], model: str
) -> None:
    client = client_of("frugal")

    def ask_until_refused() -> None:
        for _ in range(3):  # The minute may end between two of them, not between all.
            client.chat.completions.create(**greedy(model, max_tokens=1))

    with pytest.raises(RateLimitError, match="tokens of this minute") as refused:
        ask_until_refused()
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60


def test_a_streams_tokens_count_too(client_of: Callable[[str], OpenAI], model: str) -> None:
    client = client_of("frugal")

    def stream_until_refused() -> None:
        for _ in range(3):
            list(client.chat.completions.create(stream=True, **greedy(model, max_tokens=2)))

    with pytest.raises(RateLimitError, match="tokens of this minute"):
        stream_until_refused()


def test_a_key_with_a_private_cache_shares_no_prefix(client_of: Callable[[str], OpenAI], model: str) -> None:
    question = "Which of these is a river of somebody's own? " + "Rhine, Rhone, Aare, Inn. " * 4

    def num_cached(name: str) -> int:
        answer = client_of(name).chat.completions.create(**greedy(model, question, max_tokens=1))
        return answer.usage.prompt_tokens_details.cached_tokens

    assert num_cached("private") == 0
    assert num_cached("private") > 0
    assert num_cached("too") == 0
