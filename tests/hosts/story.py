"""From three bare hosts to an answer, and what then happens to them. Run by `run`, in namespaces."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from tests.hosts.cluster import Cluster, answer_in, property_of, wait_active, wait_until
from tests.hosts.host import NETWORK, Host, make_bridge
from tests.hosts.install import binds, install, write
from tests.hosts.run import NAMES

ROUTER, PROXY = "kvrelay-router@a", "kvrelay-proxy@a"
PREFILL, DECODE = "kvrelay-prefill@0", "kvrelay-decode@0"
CAP_IPC_LOCK: Final = 1 << 14
IMPATIENT: Final = "[Service]\nWatchdogSec=4\nTimeoutAbortSec=3\n"
HUNG: Final = """\
[node]
routers = ["host-a:7070"]
[engine]
model = "sim"
served_name = "hung"
tokenizer = "/models/smollm2"
num_blocks = 256
[engine.sim]
decode_context_token_s = 0.03
"""
"""A step of a long prompt takes most of a minute, and the warm-up's of a few tokens two seconds."""
LONG_PROMPT: Final = [{"role": "user", "content": "river " * 1200}]


class Story:
    """Its steps, in their order. Each is printed with the seconds that it took."""

    def __init__(self, folder: Path, wheel: Path, model: Path) -> None:
        names = {f"{NETWORK}.{number}": name for number, name in enumerate(NAMES, 1)}
        hosts = [
            Host(name, number, folder / name, names, binds(model)) for number, name in enumerate(NAMES, 1)
        ]
        self.cluster = Cluster(*hosts)
        self.front, self.prefill, self.decode = hosts
        self.wheel = wheel
        self.answer = ""

    def tell(self) -> None:
        """All of it.

        Raises:
            AssertionError: something did not go as it should.
        """
        steps: tuple[Callable[[], object], ...] = (
            self.boot_three_bare_hosts,
            self.install_on_each,
            self.start_the_services,
            self.look_how_they_run,
            self.get_a_first_answer,
            self.restart_the_proxy_under_load,
            self.let_the_watchdog_find_a_stopped_process,
            self.let_the_watchdog_find_a_hung_engine,
            self.cut_the_power_of_the_decode_host,
            self.reboot_the_front_host,
            self.stop_in_order,
        )
        began_s = time.monotonic()
        for step in steps:
            step_began_s = time.monotonic()
            note = step()
            took = f"{time.monotonic() - step_began_s:6.1f} s  {step.__name__.replace('_', ' ')}"
            print(f"{took}: {note}" if note else took, flush=True)
        print(f"{time.monotonic() - began_s:6.1f} s  in all")

    def boot_three_bare_hosts(self) -> None:
        make_bridge(f"{NETWORK}.254")
        for host in self.cluster.hosts:
            host.lay_disk()
            host.boot()
        for host in self.cluster.hosts:
            host.wait_booted()

    def install_on_each(self) -> None:
        configs = (("router-a.toml", "proxy-a.toml"), ("prefill-0.toml",), ("decode-0.toml",))
        with ThreadPoolExecutor(len(configs)) as pool:
            list(
                pool.map(
                    lambda host, names: install(host, self.wheel, names, "host-a:7070"),
                    self.cluster.hosts,
                    configs,
                )
            )

    def start_the_services(self) -> None:
        for host, units in self._units():
            host.run(f"systemctl enable kvrelay.target {units}")
            host.run("systemctl start --no-block kvrelay.target")
        for host, unit in ((self.front, ROUTER), (self.prefill, PREFILL), (self.decode, DECODE)):
            wait_active(host, unit)
        wait_active(self.front, PROXY)

    def _units(self) -> tuple[tuple[Host, str], ...]:
        return (
            (self.front, f"{ROUTER}.service {PROXY}.service"),
            (self.prefill, f"{PREFILL}.service"),
            (self.decode, f"{DECODE}.service"),
        )

    def look_how_they_run(self) -> str:
        """What the units promise of a process, by the kernel's own account."""
        for host, units in self._units():
            for unit in units.split():
                pid = property_of(host, unit, "MainPID")
                status = host.run(f"cat /proc/{pid}/status")
                assert "NoNewPrivs:\t1" in status, status
                assert "Seccomp:\t2" in status, status
                assert host.run(f"stat -c %U /proc/{pid}").strip() == "kvrelay"
                may_pin = unit.startswith((PREFILL, DECODE))  # which matters more than a limit on it
                assert f"CapEff:\t{CAP_IPC_LOCK if may_pin else 0:016x}\n" in status, status
        return "as the user kvrelay, without privileges; nodes may pin memory"

    def get_a_first_answer(self) -> str:
        self.answer = self.cluster.ask()
        assert "Paris" in self.answer, self.answer
        nodes = {node["role"]: node for node in self.cluster.status()["nodes"]}
        address = nodes["decode"]["transfer_address"]
        assert address == f"{self.decode.address}:7072", f"KV goes to {address}, which is not the decode host"
        assert nodes["prefill"]["node_id"] == "prefill-0.host-b"
        figures = {
            7071: 'kvrelay_nodes{draining="false",role="decode"} 1.0',
            8000: "kvrelay_proxy_requests_total",
        }
        for port, figure in figures.items():
            assert figure in self.front.run(f"curl --silent http://{self.front.address}:{port}/metrics")
        return repr(self.answer)

    def restart_the_proxy_under_load(self) -> str:
        """The socket stays open: callers wait, and none is turned away."""
        asked = []
        pid = property_of(self.front, PROXY, "MainPID")
        for index in range(24):
            asked.append(self.cluster.start_asking(max_tokens=8))
            if index % 12 == 6:
                self.front.run(f"systemctl restart --no-block {PROXY}")
            time.sleep(0.25)
        for one in asked:
            assert answer_in(*one.communicate(timeout=120))
        assert property_of(self.front, PROXY, "MainPID") != pid
        return f"{len(asked)} answers"

    def let_the_watchdog_find_a_stopped_process(self) -> str:
        """The event loop stands still, and with it everything."""
        write(self.front, f"/etc/systemd/system/{ROUTER}.service.d/test.conf", IMPATIENT)
        self.front.run("systemctl daemon-reload")
        self.front.run(f"systemctl restart {ROUTER}")
        self.cluster.wait_nodes(2)
        pid = property_of(self.front, ROUTER, "MainPID")
        self.front.run(f"kill -STOP {pid}")
        began_s = time.monotonic()
        wait_until(lambda: property_of(self.front, ROUTER, "MainPID") not in (pid, "0"), "a new router")
        seconds = time.monotonic() - began_s
        assert "watchdog" in self.front.run(f"journalctl --no-pager -u {ROUTER}").lower()
        wait_active(self.front, ROUTER)
        self.cluster.wait_nodes(2)
        assert self.cluster.ask() == self.answer
        return f"replaced after {seconds:.1f} s (WatchdogSec=4, TimeoutAbortSec=3)"

    def let_the_watchdog_find_a_hung_engine(self) -> str:
        """The event loop turns, the router hears the node; but a step of the engine does not end."""
        hung = DECODE.replace("@0", "@hung")
        for host, role in ((self.prefill, "prefill"), (self.decode, "decode")):
            write(host, f"/etc/kvrelay/{role}-hung.toml", HUNG)
        write(self.decode, f"/etc/systemd/system/{hung}.service.d/test.conf", IMPATIENT)
        self.decode.run("systemctl daemon-reload")
        self.prefill.run(f"systemctl start {PREFILL.replace('@0', '@hung')}")
        self.decode.run(f"systemctl start {hung}")
        pid = property_of(self.decode, hung, "MainPID")
        asking = self.cluster.start_asking(model="hung", messages=LONG_PROMPT)
        wait_until(lambda: property_of(self.decode, hung, "NRestarts") != "0", "the hung node is restarted")
        asking.kill()
        asking.communicate()
        log = self.decode.run(f"journalctl --no-pager -u {hung} _PID={pid}")
        assert "nothing has moved for" in log, log
        assert "Fatal Python error: Aborted" in log, "the stacks of its threads should be in the journal"
        for host, unit in ((self.prefill, PREFILL), (self.decode, DECODE)):
            host.run(f"systemctl stop {unit.replace('@0', '@hung')}")
        assert self.cluster.ask() == self.answer
        return "aborted with its stacks in the journal, and restarted"

    def cut_the_power_of_the_decode_host(self) -> str:
        self.decode.cut_power()
        self.cluster.wait_nodes(1)
        began_s = time.monotonic()
        self.decode.boot()
        self.decode.wait_booted()
        wait_active(self.decode, DECODE)
        seconds = time.monotonic() - began_s
        assert self.cluster.ask() == self.answer
        return f"serving {seconds:.1f} s after power came back"

    def reboot_the_front_host(self) -> str:
        self.front.reboot()
        wait_active(self.front, PROXY)
        assert self.cluster.ask() == self.answer
        return "both nodes came back by themselves"

    def stop_in_order(self) -> str:
        for host, units in self._units():
            host.run("systemctl stop kvrelay.target")
            for unit in units.split():
                self._wait_stopped(host, unit)
        self._wait_stopped(self.front, f"{PROXY}.socket")
        proxy_us, router_us = (
            int(property_of(self.front, unit, "InactiveEnterTimestampMonotonic")) for unit in (PROXY, ROUTER)
        )
        assert proxy_us < router_us, "the router stopped before the proxy"
        return "the proxy before the router"

    def _wait_stopped(self, host: Host, unit: str) -> None:
        wait_until(lambda: property_of(host, unit, "ActiveState") in ("inactive", "failed"), f"{unit} stops")
        assert property_of(host, unit, "Result") == "success", unit


def main() -> int:
    """Arguments: a folder, the wheel, the model's folder. Returns the exit status."""
    folder, wheel, model = map(Path, sys.argv[1:])
    try:
        Story(folder, wheel, model).tell()
    except AssertionError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
