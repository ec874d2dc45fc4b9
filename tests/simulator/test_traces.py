"""Reading traces: what is taken from a line, and how a bad line is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvrelay.core.errors import ConfigError
from kvrelay.simulator.cost_model import PrefillModel
from kvrelay.simulator.trace import compress_arrivals
from kvrelay.simulator.trace_file import read_trace

WriteTrace = Callable[[list[Any]], Path]
GOOD = {"timestamp": 1500, "input_length": 1000, "output_length": 7, "hash_ids": [4, 9]}


def test_requests_come_by_arrival_counted_from_the_first(write_trace: WriteTrace) -> None:
    trace = read_trace(write_trace([GOOD, GOOD | {"timestamp": 500, "input_length": 600}]), 512)
    assert trace.arrivals_s.tolist() == [0.0, 1.0]
    assert trace.num_prompt_tokens.tolist() == [600, 1000]
    assert trace.blocks_of(1) == [4, 9]


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ("{", "line 2, line: is no JSON"),
        ("[1]", "line 2, line: must be an object"),
        ({"timestamp": 1}, "line 2, input_length: is missing"),
        (GOOD | {"input_length": "12"}, "line 2, input_length"),
        (GOOD | {"input_length": 0}, "line 2, input_length"),
        (GOOD | {"output_length": -1}, "line 2, output_length"),
        (GOOD | {"timestamp": None}, "line 2, timestamp"),
        (GOOD | {"hash_ids": [4]}, "line 2, hash_ids: has 1 ids, but input_length 1000 makes 2 blocks"),
        (GOOD | {"hash_ids": [4, "x"]}, "line 2, hash_ids"),
        (GOOD | {"hash_ids": 3}, "line 2, hash_ids"),
    ],
)
def test_a_bad_line_is_named_with_its_field(write_trace: WriteTrace, bad: Any, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_trace(write_trace([GOOD, bad]), 512)
    assert named in caught.value.message


def test_other_block_sizes_keep_what_is_shared(write_trace: WriteTrace) -> None:
    path = write_trace([GOOD])
    assert read_trace(path, 1024).blocks_of(0) == [9]
    assert read_trace(path, 256).blocks_of(0) == [8, 9, 18, 19]
    with pytest.raises(ConfigError, match="must divide"):
        read_trace(path, 300)


def test_azure_requests_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,600,10\n2023-11-16 18:17:04.4799600,600,8\n"
    )
    trace = read_trace(path, 512)
    assert trace.arrivals_s[1] == pytest.approx(0.5)
    assert set(trace.blocks_of(0)).isdisjoint(trace.blocks_of(1))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a,b\n", "line 1, header"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnow,5,5\n", "line 2, TIMESTAMP"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,x,5\n", "line 2, ContextTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,5\n", "line 2, line"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no request"),
    ],
)
def test_a_bad_table_is_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        read_trace(path, 512)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        read_trace(tmp_path / "none.jsonl", 512)


def test_load_is_prefill_without_cache_over_the_nodes_time(write_trace: WriteTrace) -> None:
    trace = read_trace(write_trace([GOOD, GOOD | {"timestamp": 90_000}]), 512)
    compressed = compress_arrivals(trace, 0.5, 4, PrefillModel(1.0, 0.001, 0.0))
    assert compressed.arrivals_s[-1] == pytest.approx(4.0 / (4 * 0.5)), "two prefills of 2 s each"


def test_requests_that_all_come_at_once_can_not_be_compressed(write_trace: WriteTrace) -> None:
    trace = read_trace(write_trace([GOOD, GOOD]), 512)
    with pytest.raises(ConfigError, match="same time of arrival"):
        compress_arrivals(trace, 0.5, 4, PrefillModel(1.0, 0.001, 0.0))
