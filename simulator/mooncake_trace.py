"""Mooncake's traces: a JSON object a line, with an id for each prefix of 512-token blocks.

Source: kvcache-ai/Mooncake, FAST25-release/traces (Qin et al., FAST 2025, section 9).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Final

from kvrelay.core.errors import ConfigError
from kvrelay.simulator.trace_rows import TraceRows, bad_line, checked_tokens

HASH_BLOCK_TOKENS: Final = 512


def read_mooncake(
    lines: Iterable[str], name: str, block_tokens: int, max_requests: int | None = None
) -> TraceRows:
    """The requests, with ids for blocks of `block_tokens` tokens.

    Raises:
        ConfigError: a line is at fault, or `block_tokens` neither divides 512 nor is a multiple of it.
    """
    if block_tokens % HASH_BLOCK_TOKENS and HASH_BLOCK_TOKENS % block_tokens:
        raise ConfigError(
            f"trace {name} has ids of {HASH_BLOCK_TOKENS}-token blocks: blocks of {block_tokens} tokens must"
            " divide that or be a multiple of it",
            field="block-tokens",
        )
    rows = TraceRows()
    for number, line in enumerate(lines, 1):
        if max_requests is not None and len(rows.blocks) >= max_requests:
            break
        if line.strip():
            _read_line(line, number, name, block_tokens, rows)
    return rows


def _read_line(line: str, number: int, name: str, block_tokens: int, rows: TraceRows) -> None:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise bad_line(name, number, "line", f"is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise bad_line(name, number, "line", f"must be an object, got {row!r:.60}")
    for field_name in ("timestamp", "input_length", "output_length", "hash_ids"):
        if field_name not in row:
            raise bad_line(name, number, field_name, "is missing")
    timestamp = row["timestamp"]
    is_number = isinstance(timestamp, int | float) and not isinstance(timestamp, bool)
    if not is_number or not math.isfinite(timestamp):
        raise bad_line(name, number, "timestamp", f"must be a number of milliseconds, got {timestamp!r:.60}")
    num_prompt = checked_tokens(row["input_length"], 1, name, number, "input_length")
    num_output = checked_tokens(row["output_length"], 0, name, number, "output_length")
    ids = _checked_ids(row["hash_ids"], num_prompt, name, number)
    rows.add(timestamp / 1e3, num_prompt, max(1, num_output), _regrouped(ids, num_prompt, block_tokens))


def _checked_ids(ids: object, num_prompt: int, name: str, number: int) -> list[int]:
    is_list = isinstance(ids, list)
    if not is_list or not all(type(item) is int and 0 <= item < 2**40 for item in ids):  # type: ignore[attr-defined]
        raise bad_line(name, number, "hash_ids", "must be a list of integers from 0, below 2**40")
    assert isinstance(ids, list)
    expected = -(-num_prompt // HASH_BLOCK_TOKENS)
    if len(ids) != expected:
        text = f"has {len(ids)} ids, but input_length {num_prompt} makes {expected} blocks"
        raise bad_line(name, number, "hash_ids", text)
    return ids


def _regrouped(ids: list[int], num_prompt: int, block_tokens: int) -> Sequence[int]:
    """An id names a whole prefix, so the last id of a larger block names that, and parts are counted."""
    if block_tokens == HASH_BLOCK_TOKENS:
        return ids
    num_blocks = -(-num_prompt // block_tokens)
    if block_tokens > HASH_BLOCK_TOKENS:
        times = block_tokens // HASH_BLOCK_TOKENS
        return [ids[min((block + 1) * times, len(ids)) - 1] for block in range(num_blocks)]
    parts = HASH_BLOCK_TOKENS // block_tokens
    return [ids[block // parts] * parts + block % parts for block in range(num_blocks)]
