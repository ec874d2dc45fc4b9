"""Reading a trace file: which kind it is, and which line is at fault."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvrelay.core.errors import ConfigError
from kvrelay.simulator.azure_trace import read_azure
from kvrelay.simulator.mooncake_trace import read_mooncake
from kvrelay.simulator.trace import Trace
from kvrelay.simulator.trace_rows import TraceRows


def read_trace(path: Path, block_tokens: int, max_requests: int | None = None) -> Trace:
    """The requests of a file, by arrival: Mooncake's JSON lines, or (``.csv``) Azure's table.

    Raises:
        ConfigError: it can't be read, is empty, or has a bad line, which is named with its field.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            reader = read_azure if path.suffix == ".csv" else read_mooncake
            rows = reader(lines, path.name, block_tokens, max_requests)
    except OSError as error:
        raise ConfigError(f"trace {path} can't be read: {error.strerror}", field="TRACE") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"trace {path} is no UTF-8 text: {error.reason}", field="TRACE") from error
    if not rows.arrivals_s:
        raise ConfigError(f"trace {path} holds no request", field="TRACE")
    return _by_arrival(rows, path.name, block_tokens)


def _by_arrival(rows: TraceRows, name: str, block_tokens: int) -> Trace:
    arrivals = np.array(rows.arrivals_s)
    order = np.argsort(arrivals, kind="stable")
    counts = np.array([len(blocks) for blocks in rows.blocks], np.int64)[order]
    blocks = [rows.blocks[index] for index in order.tolist()]
    flat = [block for of_request in blocks for block in of_request]
    return Trace(
        name=name,
        arrivals_s=arrivals[order] - arrivals.min(),
        num_prompt_tokens=np.array(rows.num_prompt_tokens, np.int64)[order],
        num_output_tokens=np.array(rows.num_output_tokens, np.int64)[order],
        block_tokens=block_tokens,
        block_ids=np.array(flat, np.int64),
        block_starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
    )
