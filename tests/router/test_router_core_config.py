"""The core's configuration: all faults at once."""

import pytest

from kvrelay.core.errors import ConfigError
from kvrelay.router.config import RouterCoreConfig


def test_the_defaults_are_valid() -> None:
    assert RouterCoreConfig().max_attempts >= 2


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RouterCoreConfig(max_attempts=0, queue_timeout_s=-1.0, ack_timeout_s=9.0, lease_s=3.0)
    lines = caught.value.message.splitlines()
    assert len(lines) == 3
    assert "max_attempts must be an integer of at least 1, got 0" in lines
    assert "ack_timeout_s (9) must not be above lease_s (3)" in lines


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "5"])
def test_a_time_must_be_a_finite_number(value: object) -> None:
    with pytest.raises(ConfigError, match="node_wait_s"):
        RouterCoreConfig(node_wait_s=value)  # type: ignore[arg-type]
