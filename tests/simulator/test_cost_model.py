"""Cost-model files: the shipped ones, and what a bad one is told."""

import json
from pathlib import Path

import pytest

from kvrelay.core.errors import ConfigError
from kvrelay.simulator.cost_model import SHIPPED, load_cost_model

GOOD = {
    "prefill": {"base_s": 0.0, "token_s": 1e-5, "pair_s": 0},
    "link": {"pull_base_s": 0, "pull_token_s": 0, "handoff_base_s": 0, "handoff_token_s": 0},
    "decode": {
        "batches": [1, 3],
        "step_s": [0.01, 0.03],
        "context_token_s": 0,
        "kv_tokens": 100,
        "max_num_seqs": 4,
    },
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_load(name: str) -> None:
    assert load_cost_model(name).prefill.one(8192, 0) == pytest.approx(0.23, rel=0.2)


def test_steps_are_interpolated_by_batch_and_go_on_beyond_the_table(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(GOOD))
    assert load_cost_model(str(path)).decode.batch_step_s() == pytest.approx((0.0, 0.01, 0.02, 0.03, 0.04))


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    bad = GOOD | {"prefill": {"base_s": -1, "token_s": "x", "pair_s": 0, "more": 1}, "extra": {}}
    path.write_text(json.dumps(bad))
    with pytest.raises(ConfigError) as caught:
        load_cost_model(str(path))
    for part in ("prefill.base_s", "prefill.token_s", "prefill.more", "[extra]"):
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batches": [3, 1]}, "must rise"),
        ({"batches": [1]}, "has 1 entries"),
        ({"step_s": [0, 1]}, "above 0"),
        ({"step_s": 3}, "decode.step_s must be a list"),
    ],
)
def test_a_bad_table_of_steps_is_named(tmp_path: Path, change: dict[str, object], named: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(GOOD | {"decode": GOOD["decode"] | change}))  # type: ignore[operator]
    with pytest.raises(ConfigError, match=named):
        load_cost_model(str(path))


def test_a_file_that_is_not_there_or_not_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="independent and h100"):
        load_cost_model("nowhere.toml")
    path = tmp_path / "bad.toml"
    path.write_text("= 3")
    with pytest.raises(ConfigError, match=r"cost model .*bad\.toml"):
        load_cost_model(str(path))
