"""Texts that were tokenized before: bounded, by salt, safe between threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from kvrelay.client.piece_cache import PieceCache


def found(cache: PieceCache, *texts: str, salt: bytes = b"") -> list[list[int] | None]:
    return [None if ids is None else list(ids) for ids in cache.find(texts, salt=salt)]


def test_what_was_kept_is_found_under_its_salt_only() -> None:
    cache = PieceCache(1 << 20)
    cache.keep("the fox", [1, 2**32 - 1], salt=b"a")
    assert found(cache, "the fox", "x", salt=b"a") == [[1, 2**32 - 1], None]
    assert found(cache, "the fox") == [None]


def test_the_least_recently_used_goes_first() -> None:
    cache = PieceCache(4000)
    cache.keep("old", [1])
    cache.keep("used", [2])
    for number in range(100):
        cache.keep(f"new {number}", [3])
        assert found(cache, "used") == [[2]]
    assert found(cache, "old", "new 0", "new 99") == [None, None, [3]]


def test_bytes_are_bounded_and_a_large_text_drives_nothing_out() -> None:
    cache = PieceCache(10_000)
    cache.keep("small", [1])
    cache.keep("x" * 5000, [1])
    cache.keep("ids", range(5000))
    assert found(cache, "small", "x" * 5000, "ids") == [[1], None, None]
    for number in range(200):
        cache.keep(f"{number} {'日' * 200}", range(100))
        assert 0 < cache.num_bytes <= 10_000
    assert found(cache, "small") == [None]


def test_nothing_is_kept_in_no_bytes() -> None:
    cache = PieceCache(0)
    cache.keep("", [])
    assert (found(cache, ""), cache.num_bytes) == ([None], 0)


def test_bytes_add_up_when_threads_share_it() -> None:
    cache = PieceCache(20_000)

    def work(seed: int) -> None:
        for step in range(2000):
            number = (seed * 7 + step * 13) % 97
            if cache.find([str(number)])[0] is None:
                cache.keep(str(number), [number])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    kept = [number for number in range(97) if found(cache, str(number)) == [[number]]]
    alone = PieceCache(1 << 20)
    for number in kept:
        alone.keep(str(number), [number])
    assert cache.num_bytes == alone.num_bytes > 0
