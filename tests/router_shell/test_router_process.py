"""The router as a process: its ready file, its signals, its complaints."""

import asyncio
import json
import signal
import socket
import sys

import pytest

from kvrelay.core.errors import ConfigError
from kvrelay.core.node_messages import Role
from kvrelay.node.sd_notify import Notifier
from kvrelay.node.stop_signals import StopSignals
from kvrelay.router.main import until_stopped
from kvrelay.router.server_config import RouterConfig

SCRIPT = """
import json, sys
from kvrelay.router.main import run_router
from kvrelay.router.server_config import RouterConfig
sys.exit(run_router(RouterConfig(listen_host="127.0.0.1", **json.loads(sys.argv[1]))))
"""


async def start(**settings):
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", SCRIPT, json.dumps(settings), stderr=asyncio.subprocess.PIPE
    )


async def until_exit(process):
    async with asyncio.timeout(60):
        _, errors = await process.communicate()
    return process.returncode, errors.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_router_says_when_it_is_ready_and_leaves_cleanly(tmp_path, number):
    ready_file = tmp_path / "ready.json"
    process = await start(grpc_port=0, http_port=0, ready_file=str(ready_file))
    line = b""
    while b"ready grpc=" not in line:
        line = await asyncio.wait_for(process.stderr.readline(), 60)
        assert line, "it ended before it was ready"
    while not ready_file.exists():  # noqa: ASYNC110  # written right after that line
        await asyncio.sleep(0)
    facts = json.loads(ready_file.read_text())
    assert facts["pid"] == process.pid
    assert facts["role"] == "router"
    host, port = facts["grpc_address"].rsplit(":", 1)
    _, writer = await asyncio.open_connection(host, int(port))
    writer.close()
    await writer.wait_closed()
    process.send_signal(number)
    code, errors = await until_exit(process)
    assert code == 0, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("field", ["grpc_port", "http_port"])
async def test_a_taken_port_is_named_with_its_field(field):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = await start(**{"grpc_port": 0, "http_port": 0, field: port})
        code, errors = await until_exit(process)
    assert code == 2
    assert f"{field} {port}" in errors
    assert "Traceback" not in errors


def test_a_bad_configuration_names_all_its_faults_at_once():
    with pytest.raises(ConfigError) as caught:
        RouterConfig(grpc_port=-1, http_port=70000, max_sessions=0, log_level="loud", drain_timeout_s=-1)
    for name in ("grpc_port", "http_port", "max_sessions", "log_level", "drain_timeout_s"):
        assert name in caught.value.message


def test_two_services_cannot_share_a_port():
    with pytest.raises(ConfigError, match="must differ"):
        RouterConfig(grpc_port=7070, http_port=7070)


async def test_told_twice_the_router_leaves_at_once_and_still_releases(
    make_router, cluster, open_session, call
):
    router = await make_router()
    await cluster.add(router.address, "p0", Role.PREFILL)
    decode = await cluster.add(router.address, "d0", Role.DECODE)
    cluster.stop_before = "decode"
    session = open_session(router)
    await session.ask((1, call()))
    await session.until_tokens(1, 1)
    signals = StopSignals()
    stopping = asyncio.create_task(
        until_stopped(RouterConfig(drain_timeout_s=600), router.server, signals, Notifier())
    )
    signals.first.set()
    await router.until(lambda: router.server.shell.is_draining)
    signals.second.set()
    assert await asyncio.wait_for(stopping, 20) == 1
    await session.until_ended(1)
    assert session.failed[1].retryable
    assert not decode.held
