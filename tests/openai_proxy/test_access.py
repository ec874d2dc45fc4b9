"""API keys: known by their hash, limited over all workers; a faulty file tells all its faults at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from kvrelay.core.errors import ConfigError
from kvrelay.core.service_terms import Priority
from kvrelay.openai_proxy.access import (
    Access,
    ApiKey,
    Grant,
    hash_key,
    key_as_toml,
    new_key,
    parse_keys,
    read_keys,
)
from kvrelay.openai_proxy.errors import ApiError
from kvrelay.openai_proxy.usage_board import UsageBoard

ADA, BOB = "kvr-ada", "kvr-bob"


def make(now_s: Callable[[], float] = lambda: 0.0, **limits: int) -> Access:
    keys = (ApiKey("ada", hash_key(ADA), **limits), ApiKey("bob", hash_key(BOB)))
    return Access(keys, UsageBoard(2), now_s)


def admit(access: Access, key: str = ADA) -> Grant:
    return access.admit({"authorization": f"Bearer {key}"})


def refusal(access: Access, **headers: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        access.admit(headers)
    return caught.value


# ---- what it may ask for


def test_a_key_gets_no_higher_priority_than_it_is_allowed() -> None:
    access = Access([ApiKey("ada", hash_key(ADA), max_priority="normal")], UsageBoard(1))
    served = [admit(access).priority(wanted) for wanted in (Priority.HIGH, Priority.NORMAL, Priority.LOW)]
    assert served == [Priority.NORMAL, Priority.NORMAL, Priority.LOW]
    assert Grant().priority(Priority.HIGH) is Priority.HIGH


# ---- who


def test_a_key_is_known_by_its_text() -> None:
    access = make()
    assert admit(access).name == "ada"
    assert admit(access, BOB).name == "bob"
    assert access.admit({"authorization": f"bearer  {ADA} "}).name == "ada"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer ",
        f"Basic {ADA}",
        ADA,
        "Bearer kvr-adb",
        f"Bearer {hash_key(ADA)}",
        "Bearer \udc80",
    ],
)
def test_whoever_has_no_key_is_refused(value: str) -> None:
    error = refusal(make(), authorization=value)
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert ADA not in error.message


def test_without_keys_anybody_may_ask() -> None:
    grant = Access((), UsageBoard(0)).admit({})
    grant.charge(5)
    grant.release()
    assert (grant.name, grant.cache_salt("s")) == ("", b"s")


# ---- how much


def test_a_key_at_its_limit_waits_for_one_of_its_requests_to_end() -> None:
    access = make(max_concurrent=2)
    first, _ = admit(access), admit(access)
    error = refusal(access, authorization=f"Bearer {ADA}")
    assert (error.status, error.headers()) == (429, {"retry-after": "1"})
    admit(access, BOB)
    first.release()
    first.release()
    admit(access)
    assert refusal(access, authorization=f"Bearer {ADA}").status == 429


def test_tokens_count_until_the_minute_is_over() -> None:
    now = [120.0]
    access = make(lambda: now[0], tokens_per_minute=10)
    grant = admit(access)
    grant.charge(9)
    admit(access).charge(5)
    now[0] = 150.0
    error = refusal(access, authorization=f"Bearer {ADA}")
    assert (error.status, error.headers()) == (429, {"retry-after": "30"})
    admit(access, BOB)
    now[0] = 180.0
    grant.charge(9)
    admit(access)


def test_what_was_read_counts_however_the_request_ended() -> None:
    access = make(lambda: 60.0, tokens_per_minute=10)
    grant, num_read = admit(access), [0]
    grant.count_at_end(lambda: num_read[0])
    grant.count_at_end(lambda: 3)
    num_read[0] = 7
    admit(access)
    grant.release()
    grant.release()
    assert refusal(access, authorization=f"Bearer {ADA}").status == 429


def test_a_private_cache_is_shared_with_nobody() -> None:
    def salts(*, private: bool) -> list[bytes]:
        keys = [ApiKey(name, hash_key(name), private_cache=private) for name in ("a", "b")]
        access = Access(keys, UsageBoard(2))
        return [admit(access, name).cache_salt(given) for name in "ab" for given in ("", "x")]

    assert len(set(salts(private=True))) == 4
    assert salts(private=True) == salts(private=True)
    assert salts(private=False) == [b"", b"x"] * 2


# ---- the file


def test_a_keys_file_holds_hashes_only(tmp_path: Path) -> None:
    text = new_key()
    key = ApiKey("ada", hash_key(text), 3, 1000, True)
    file = tmp_path / "keys.toml"
    file.write_text(key_as_toml(key))
    assert text not in file.read_text()
    assert read_keys(file) == (key,)
    assert new_key() != text


def test_all_faults_of_a_file_are_told_at_once() -> None:
    good = key_as_toml(ApiKey("a", hash_key("x")))
    with pytest.raises(ConfigError) as caught:
        parse_keys(
            f'other = 1\n{good}{good}[[key]]\nname = "a b"\nsha256 = "00"\nmax_concurrent = -1\n'
            "tokens_per_minute = true\nprivate_cache = 1\ncolour = 2\n",
            "keys.toml",
        )
    lines = caught.value.message.splitlines()
    assert all(line.startswith("keys.toml: ") for line in lines)
    for what in (
        "'other'",
        "name must",
        "sha256 must",
        "max_concurrent",
        "tokens_per_minute",
        "private_cache",
    ):
        assert any(what in line for line in lines), what
    assert any("key 3: colour is not a setting" in line for line in lines)
    assert any("two keys have the name 'a'" in line for line in lines)
    assert any("two keys have the sha256" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[key]\n", "not TOML"),
        ("key = 5", "must be at most"),
        ("key = [5]", "key 1: must be a table"),
        ("[[key]]\n", "name must match"),
        (f'[[key]]\nname = "a\\n"\nsha256 = "{"0" * 64}"', "name must match"),
    ],
)
def test_a_file_of_another_shape_is_a_clear_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_keys(text, "x")


@pytest.mark.parametrize(
    "content", [None, b"\xff\xfe", b"#" * (5 << 20)], ids=["missing", "not UTF-8", "huge"]
)
def test_a_file_that_can_not_be_read_is_a_clear_error(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_keys(file)
    assert caught.value.field == "keys_file"


# ---- several workers


def in_worker(number: int, shared: UsageBoard, pipe: Connection) -> None:
    """A worker that does what it is told: enter, add tokens, or end."""
    board = UsageBoard(2, 3, number, shared.shared)
    while (command := pipe.recv()) != "end":
        pipe.send(board.enter(1) if command == "enter" else board.add_tokens(1, 7, 100))
    pipe.send(None)


def test_counts_hold_over_all_workers_and_a_dead_ones_go_to_its_successor() -> None:
    board = UsageBoard(2, 3)
    context = multiprocessing.get_context("fork")
    pipes, workers = [], []

    def start(number: int) -> None:
        ours, theirs = context.Pipe()
        workers.append(context.Process(target=in_worker, args=(number, board, theirs)))
        workers[-1].start()
        theirs.close()
        pipes.append(ours)

    def tell(index: int, command: str) -> object:
        pipes[index].send(command)
        return pipes[index].recv()

    try:
        start(1)
        start(2)
        assert [tell(0, "enter"), tell(1, "enter"), tell(0, "enter"), board.enter(1)] == [1, 2, 3, 4]
        assert board.enter(0) == 1
        tell(0, "tokens")
        tell(1, "tokens")
        board.add_tokens(1, 7, 1)
        assert (board.tokens(1, 7), board.tokens(1, 8), board.tokens(0, 7)) == (201, 0, 0)
        pid = workers[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        workers[0].join()
        start(1)
        assert tell(2, "enter") == 3, "the dead worker's two requests are gone"
        assert board.tokens(1, 7) == 101
        for index in (1, 2):
            tell(index, "end")
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def test_a_new_window_forgets_the_one_before() -> None:
    board = UsageBoard(1)
    board.add_tokens(0, 1, 5)
    board.add_tokens(0, 1, 5)
    board.add_tokens(0, 2, 3)
    assert (board.tokens(0, 1), board.tokens(0, 2)) == (0, 3)
