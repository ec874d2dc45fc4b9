"""Azure's traces: a table of arrival, prompt and answer length. They say nothing of prefixes: none is shared.

Source: Azure/AzurePublicDataset; cite Splitwise (Patel et al., ISCA 2024).
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from datetime import datetime
from typing import Final

from kvrelay.simulator.trace_rows import TraceRows, bad_line, checked_tokens

_COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def read_azure(
    lines: Iterable[str], name: str, block_tokens: int, max_requests: int | None = None
) -> TraceRows:
    """The requests.

    Raises:
        ConfigError: the header or a line is at fault.
    """
    reader = csv.reader(lines)
    header = next(reader, [])
    if tuple(header) != _COLUMNS:
        raise bad_line(name, 1, "header", f"must be {','.join(_COLUMNS)}, got {','.join(header):.80}")
    rows, next_block = TraceRows(), 0
    for row in reader:
        if max_requests is not None and len(rows.blocks) >= max_requests:
            break
        if not row:
            continue
        number = reader.line_num
        if len(row) != len(_COLUMNS):
            raise bad_line(name, number, "line", f"must have {len(_COLUMNS)} fields, has {len(row)}")
        num_prompt = _tokens(row[1], 1, name, number, "ContextTokens")
        num_output = _tokens(row[2], 0, name, number, "GeneratedTokens")
        num_blocks = -(-num_prompt // block_tokens)
        blocks = range(next_block, next_block + num_blocks)
        next_block += num_blocks
        rows.add(_seconds(row[0], name, number), num_prompt, max(1, num_output), blocks)
    return rows


def _tokens(text: str, least: int, name: str, number: int, field_name: str) -> int:
    value: object = int(text) if text.isascii() and text.isdigit() and len(text) < 12 else text
    return checked_tokens(value, least, name, number, field_name)


def _seconds(text: str, name: str, number: int) -> float:
    """Azure writes seven digits of a second, which Python takes from 3.11 on only cut to six."""
    whole, _, fraction = text.partition(".")
    try:
        seconds = datetime.fromisoformat(f"{whole}+00:00").timestamp()
        return seconds + (float(f"0.{fraction}") if fraction else 0.0)
    except ValueError as error:
        raise bad_line(name, number, "TIMESTAMP", f"is no time: {text!r:.60}") from error
