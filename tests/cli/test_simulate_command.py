"""`kvrelay simulate`: what it prints and writes, and what bad input gets."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvrelay.cli.main import app
from kvrelay.core.errors import ConfigError


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": n * 100, "input_length": 1000, "output_length": 1 + n % 9, "hash_ids": [n % 7, 100 + n]}
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_it_prints_the_figures_and_writes_them_as_json_with_a_plot(trace: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.svg"
    arguments = ["simulate", str(trace), "--prefill", "2", "--decode", "2", "--load", "0.7"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(out), "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    for word in ("TTFT", "ITL", "goodput", "pooled", "pulls", "busiest", "refused"):
        assert word in done.output
    figures = json.loads(out.read_text())
    assert {"mean", "p50", "p90", "p99"} <= figures["ttft_s"].keys()
    assert {"mean", "p50", "p90", "p99"} <= figures["itl_s"].keys()
    names = {"hit_rate", "pooled_hit_rate", "pulled_rate", "balance_max_over_mean", "goodput", "refused"}
    assert names <= figures.keys()
    assert plot.read_text().startswith("<svg")


def test_requests_that_tell_their_limits_are_refused_early(trace: Path) -> None:
    arguments = ["simulate", str(trace), "--prefill", "1", "--decode", "1", "--load", "3", "--deadlines"]
    limits = ["--ttft-limit-ms", "200", "--total-limit-s", "5"]
    done = CliRunner().invoke(app, [*arguments, *limits, "--json", "-"])
    figures = json.loads(done.output)
    assert figures["refused"] == sum(figures["refused_by_reason"].values()) > 0
    told = CliRunner().invoke(app, [*arguments, *limits])
    assert "and in all <= 5.000 s" in told.output
    assert "dropped" in told.output


def test_the_same_command_writes_the_same_bytes(trace: Path) -> None:
    arguments = ["simulate", str(trace), "--prefill", "2", "--no-decode", "--seed", "3", "--json", "-"]
    first, again = (CliRunner().invoke(app, arguments).output for _ in range(2))
    assert first == again
    assert json.loads(first)["itl_s"]["mean"] is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--policy", "best"], "--policy best is unknown"),
        (["--cost-model", "nowhere.toml"], "nowhere.toml"),
        (["--load", "0"], "load must be above 0"),
        (["--json", "/nowhere/at/all.json", "--no-decode"], "can't be written"),
    ],
)
def test_bad_input_is_named(trace: Path, arguments: list[str], named: str) -> None:
    done = CliRunner().invoke(app, ["simulate", str(trace), *arguments])
    assert isinstance(done.exception, ConfigError)
    assert named in done.exception.message


def test_a_request_that_fits_no_decode_node_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = {"timestamp": 0, "input_length": 512_000, "output_length": 1, "hash_ids": list(range(1000))}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"timestamp": 9}) + "\n")
    done = CliRunner().invoke(app, ["simulate", str(path)])
    assert isinstance(done.exception, ConfigError)
    assert "--no-decode" in done.exception.message
