"""`kvrelay up` with real processes and the engine that needs no model: it answers, stays, stops, and leaves
nothing behind however it ends."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.cluster

WAIT_S = 120.0
Spawn = Callable[..., subprocess.Popen[str]]
SIM = ("up", "--model", "sim", "--port", "0", "--transport", "tcp")


@dataclass
class RunningUp:
    """A `kvrelay up` that has said it is ready."""

    process: subprocess.Popen[str]
    address: str
    children: list[psutil.Process]
    log_dir: Path

    def child(self, name: str) -> psutil.Process:
        return next(child for child in self.children if name in child.cmdline())

    def assert_nothing_is_left(self) -> None:
        _, alive = psutil.wait_procs(self.children, timeout=WAIT_S)
        assert not alive


@pytest.fixture
def start_up(spawn: Spawn, tmp_path: Path) -> Iterator[Callable[..., RunningUp]]:
    started: list[RunningUp] = []

    def start(*arguments: str) -> RunningUp:
        log_dir = tmp_path / "logs"
        process = spawn(*SIM, "--log-dir", str(log_dir), *arguments)
        assert process.stderr is not None
        said: list[str] = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"ready: router (\S+)", line):
                children = psutil.Process(process.pid).children(recursive=True)
                started.append(RunningUp(process, found[1], children, log_dir))
                return started[-1]
        raise AssertionError("up ended before it was ready:\n" + "".join(said))

    yield start
    for running in started:
        for child in running.children:
            if child.is_running():
                child.kill()


def test_once_answers_shows_how_it_was_served_and_stops(spawn: Spawn, tmp_path: Path) -> None:
    process = spawn(*SIM, "--once", "hello", "--max-tokens", "12", "--log-dir", str(tmp_path))
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, err
    answer, _, summary = out.partition("\n\n")
    assert len(answer.split()) == 12
    assert re.search(r"placement  prefill-0 \(pid \d+\) -> decode-0 \(pid \d+\)", summary)
    assert "prompt     5 tokens, 0 of them cached" in summary
    assert re.search(
        r"TTFT [\d.]+ ms; second token [\d.]+ ms later; ITL p50 [\d.]+ ms, p99 [\d.]+ ms; [\d.]+ tokens/s",
        summary,
    )
    assert re.search(
        r"KV moved   \d+ B in \d+ messages? over tcp, begun [\d.]+ ms before it was whole", summary
    )
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", summary)]
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_two_questions_at_once_do_not_fight_over_ports(spawn: Spawn) -> None:
    both = [spawn("up", "--model", "sim", "--once", "hi", "--max-tokens", "2") for _ in range(2)]
    for process in both:
        _, err = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, err


def test_a_temporary_log_folder_goes_after_a_clean_end(spawn: Spawn, tmp_path: Path) -> None:
    process = spawn(*SIM, "--once", "hi", "--max-tokens", "2", TMPDIR=str(tmp_path))
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, err
    assert str(tmp_path) in err
    assert not list(tmp_path.glob("kvrelay-up-*"))


def test_up_stays_serves_and_stops_in_order_on_sigterm(
    start_up: Callable[..., RunningUp], invoke: Any, tmp_path: Path
) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('[cluster]\ndecode = 2\n[engine]\nnum_blocks = 77\n[router]\nrouter_id = "mine"\n')
    running = start_up("--config", str(file), "--block-size", "8")
    assert not [found.path for found in running.child("router").memory_maps() if "torch" in found.path]
    status = invoke("status", "--router", running.address)
    assert [line.split()[0] for line in status.out.splitlines()[3:6]] == ["prefill-0", "decode-0", "decode-1"]
    assert status.out.startswith("router mine,")
    assert f"{77 * 8} tokens of context" in status.out
    question = ("--token-ids", "1,2,3", "--max-tokens", "4", "--request-id", "mine")
    asked = invoke("generate", "--router", running.address, *question)
    assert len(asked.out.split()) == 4
    explained = invoke("explain", "mine", "--router", running.address).out
    assert re.search(r"^prefill-0 +chosen ", explained, re.MULTILINE)
    assert re.search(r"measured [\d.]+ ms from this placement, [\d.]+ ms from submission", explained)
    assert "request    done (length) after " in explained
    assert "4 output tokens" in explained
    assert invoke("explain", "theirs", "--router", running.address).code == 2
    running.process.send_signal(signal.SIGTERM)
    _, err = running.process.communicate(timeout=WAIT_S)
    assert running.process.returncode == 0, err
    running.assert_nothing_is_left()
    assert sorted(file.name for file in running.log_dir.glob("*.log")) == [
        "decode-0.log",
        "decode-1.log",
        "prefill-0.log",
        "proxy.log",
        "router.log",
    ]


@pytest.mark.parametrize("name", ["router", "prefill", "decode", "proxy"])
def test_a_dead_child_is_named_with_its_last_words_and_all_others_stop(
    name: str, start_up: Callable[..., RunningUp]
) -> None:
    running = start_up()
    victim = running.child(name)
    victim.kill()
    _, err = running.process.communicate(timeout=WAIT_S)
    assert running.process.returncode == 1
    assert f"(pid {victim.pid}) was killed by SIGKILL" in err
    assert f"{name}" in err
    assert ".log:\n    " in err
    assert "Traceback" not in err
    running.assert_nothing_is_left()


def test_no_orphan_outlives_an_up_that_was_killed(start_up: Callable[..., RunningUp]) -> None:
    running = start_up()
    assert len(running.children) == 4
    running.process.kill()
    running.assert_nothing_is_left()


def test_ctrl_c_while_starting_leaves_nothing(spawn: Spawn, tmp_path: Path) -> None:
    process = spawn(*SIM, "--log-dir", str(tmp_path))
    assert process.stderr is not None
    while "starting the router" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130, err
    assert not [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(tmp_path) in str(process.info["cmdline"])
    ]


def test_a_port_in_use_ends_up_with_the_routers_own_words(spawn: Spawn, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = spawn(
            "up", "--model", "sim", "--port", str(port), "--http-port", "0", "--log-dir", str(tmp_path)
        )
        _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert "router (pid" in err
    assert str(port) in err
    assert "ended with exit status 2" in err
