"""`kvrelay status` against a scripted router."""

from __future__ import annotations

import json
import signal
from typing import Any


def test_status_shows_nodes_requests_counters_and_mismatches(invoke: Any, fake_router: Any) -> None:
    outcome = invoke("status", "--router", fake_router.address)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "router router-a, kvrelay 0.1.0, up 1 h 1 min"
    assert lines[3].split() == ["p0", "prefill", "tiny", "host-a:11", "2/1", "10/20/90", "3", "tcp", "ready"]
    assert lines[4].split() == [
        "d0",
        "decode",
        "tiny",
        "host-a:12",
        "2/1",
        "10/20/90",
        "3",
        "tcp",
        "draining",
    ]
    assert "requests  decoding 2" in lines
    assert "queue     high 2 of at most 1,024, refused 3 full" in lines
    assert "counters  requests 5" in lines
    assert "index     1,200 of at most 10,000,000 blocks, 0.1 MB, 3 evicted; guessed for p0" in lines
    assert "mismatch  p9 and d9: dtype: 'float32' != 'bfloat16'" in lines
    assert "models    tiny (1 prefill, 1 decode, 4096 tokens of context)" in lines


def test_json_status_holds_everything(invoke: Any, fake_router: Any) -> None:
    found = json.loads(invoke("status", "--router", fake_router.address, "--json").out)
    assert found["router_id"] == "router-a"
    assert {node["node_id"] for node in found["nodes"]} == {"p0", "d0"}
    assert found["nodes"][0]["load"]["num_held_blocks"] == 10
    assert found["models"][0]["name"] == "tiny"
    assert found["queues"] == [
        {"priority": "high", "num_queued": 2, "max_queued": 1024, "refused": {"full": 3, "tenant": 0}}
    ]


def test_watch_goes_on_until_ctrl_c(spawn: Any, fake_router: Any) -> None:
    process = spawn("status", "--router", fake_router.address, "--watch", "--json", "--interval", "0.1")
    assert json.loads(process.stdout.readline())["router_id"] == "router-a"
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130


def test_status_without_a_router_says_so(invoke: Any) -> None:
    outcome = invoke("status", "--router", "127.0.0.1:1")
    assert outcome.code == 3
    assert "127.0.0.1:1" in outcome.err
