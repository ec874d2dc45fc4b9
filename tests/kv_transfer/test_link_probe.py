"""A new link is measured, and one that is far too slow is told of, or refused."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest

from kvrelay.core.errors import ConfigError, TransferFailed
from kvrelay.kv_transfer.config import KVTransferConfig
from kvrelay.kv_transfer.interface import PushDone, PushFailed
from kvrelay.kv_transfer.link_probe import (
    MAX_PROBE_S,
    MAX_PROBE_WRITES,
    PROBE_BYTES,
    LinkProbe,
    floor_gb_per_s,
    slow_link_text,
)
from kvrelay.kv_transfer.transport import SCRATCH_BYTES

needs_nixl = pytest.mark.skipif(sys.platform != "linux", reason="NIXL has wheels for Linux alone")


@pytest.fixture
def transport() -> str:
    return "ucx"


def test_a_probe_ends_after_some_writes_and_reports_the_best() -> None:
    probe, now_s, num_writes = LinkProbe(1000), 5.0, 0
    is_going_on = True
    while is_going_on:
        probe.write_started(now_s)
        now_s += 0.002 if num_writes != 2 else 0.001
        num_writes += 1
        is_going_on = probe.write_ended(now_s)
    assert num_writes == MAX_PROBE_WRITES
    assert probe.bytes_per_s == pytest.approx(1_000_000)


def test_a_probe_of_a_slow_link_ends_by_time() -> None:
    probe = LinkProbe(1000)
    probe.write_started(0.0)
    assert not probe.write_ended(MAX_PROBE_S)
    assert probe.bytes_per_s == pytest.approx(1000 / MAX_PROBE_S)


def test_a_probe_is_bounded_in_bytes() -> None:
    assert all(num_bytes <= SCRATCH_BYTES for num_bytes in PROBE_BYTES.values())
    assert MAX_PROBE_WRITES * max(PROBE_BYTES.values()) <= 256 << 20


@pytest.mark.parametrize(
    ("configured", "is_on_gpus", "is_one_host", "floor"),
    [
        (-1, True, True, 50),
        (-1, True, False, 0),
        (-1, False, True, 0),
        (0, True, True, 0),
        (7, False, False, 7),
    ],
)
def test_only_gpus_of_one_host_have_a_floor_of_their_own(
    configured: float, is_on_gpus: bool, is_one_host: bool, floor: float
) -> None:
    assert floor_gb_per_s(configured, is_on_gpus=is_on_gpus, is_one_host=is_one_host) == floor


def test_the_warning_names_nodes_figures_and_cause() -> None:
    assert slow_link_text(("p", "d"), 50e9, 50, is_on_gpus=True) is None
    text = slow_link_text(("p0", "d0 (host:1)"), 3.25e9, 50, is_on_gpus=True)
    assert text is not None
    for part in ("p0", "d0 (host:1)", "3.25 GB/s", "50", "cuda_ipc", "TCP"):
        assert part in text


def test_a_floor_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="link_floor_gb_per_s"):
        KVTransferConfig(link_floor_gb_per_s=float("nan"))


@needs_nixl
async def test_a_link_says_what_it_gave(pair: Any, kv: Any) -> None:
    handoff = kv.Handoff(*pair, num_tokens=40)
    handoff.start()
    assert isinstance((await handoff.outcomes())[0], PushDone)
    handoff.assert_equal()
    [(address, bytes_per_s)] = pair[0].service.link_bytes_per_s().items()
    assert address == pair[1].service.address
    assert 1e7 < bytes_per_s < 1e12


@needs_nixl
async def test_a_slow_link_is_used_and_warned_about(
    make_node: Any, kv: Any, caplog: pytest.LogCaptureFixture
) -> None:
    sender = await make_node("prefill-7", link_floor_gb_per_s=9999.0)
    handoff = kv.Handoff(sender, await make_node("decode-3"), num_tokens=40)
    with caplog.at_level(logging.WARNING, "kvrelay.kv_transfer"):
        handoff.start()
        assert isinstance((await handoff.outcomes())[0], PushDone)
    [warning] = [record.getMessage() for record in caplog.records]
    assert "from prefill-7 to decode-3" in warning
    assert "at least 9999 were expected" in warning


@needs_nixl
async def test_a_slow_link_is_refused_where_that_is_wanted(make_node: Any, kv: Any) -> None:
    sender = await make_node("prefill", link_floor_gb_per_s=9999.0, refuse_slow_links=True)
    receiver = await make_node("decode")
    handoff = kv.Handoff(sender, receiver, num_tokens=40)
    handoff.start()
    pushed = await sender.recorder.outcome(handoff.transfer_id)
    assert isinstance(pushed, PushFailed)
    assert isinstance(pushed.error, TransferFailed)
    assert "refuse_slow_links is set" in str(pushed.error)
    assert receiver.store.num_scatters == 0
    await receiver.service.cancel(handoff.transfer_id)
    await kv.eventually(lambda: kv.at_rest(sender) and kv.at_rest(receiver), "slots leaked")
