"""One host: a systemd of its own on a disk of its own, plugged into the bridge of this network namespace."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.hosts import cgroups

BRIDGE: Final = "br0"
NETWORK: Final = "10.77.0"
BOOT_TIMEOUT_S: Final = 240.0
RUN_TIMEOUT_S: Final = 240.0
_POLL_S: Final = 0.1
_MASKED: Final = (
    "systemd-firstboot",
    "systemd-resolved",
    "systemd-timesyncd",
    "systemd-networkd",
    "console-getty",
    "getty@",
    "e2scrub_reap",
)
_NETWORK_UNIT: Final = """\
[Unit]
DefaultDependencies=no
Before=network.target network-online.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'ip link set lo up && ip addr add {address}/24 dev host0 && ip link set host0 up'
[Install]
WantedBy=multi-user.target
"""


class CommandFailed(AssertionError):
    """A command in a host ended as it should not have; has its output."""


@dataclass
class Host:
    """A host called `name`, the `number`th of its network, which knows `names` by address.

    `binds` are folders of this machine that it sees, read-only, at another place. Its disk is the machine's
    own root with a writable layer in memory, which survives `cut_power`, as a disk does.
    """

    name: str
    number: int
    folder: Path
    names: Mapping[str, str]
    binds: Mapping[Path, str] = field(default_factory=dict)
    _nspawn: subprocess.Popen[bytes] | None = None
    _leader: int = 0

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number}"

    @property
    def root(self) -> Path:
        """Its disk, as this machine sees it."""
        return self.folder / "root"

    @property
    def _cgroup(self) -> str:
        return cgroups.name_of(self.name)

    @property
    def _link(self) -> str:
        return f"vb-{self.name}"

    # ---- power and cable ---------------------------------------------------------------------------

    def lay_disk(self) -> None:
        """Once, before the first boot."""
        layer = self.folder / "layer"
        for folder in (layer, self.root):
            folder.mkdir(parents=True)
        _call("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(layer))
        for part in ("upper", "work"):
            (layer / part).mkdir()
        options = f"lowerdir=/,upperdir={layer}/upper,workdir={layer}/work"
        _call("mount", "-t", "overlay", "-o", options, "overlay", str(self.root))
        self._configure()

    def _configure(self) -> None:
        etc, units = self.root / "etc", self.root / "etc/systemd/system"
        units.mkdir(parents=True, exist_ok=True)
        for enabled in units.glob("*.wants"):
            _call("rm", "-rf", str(enabled))
        for name in ("fstab", "resolv.conf"):
            (etc / name).unlink(missing_ok=True)
        (etc / "machine-id").write_text(f"{uuid.uuid4().hex}\n")
        (etc / "hostname").write_text(f"{self.name}\n")
        known = {"127.0.0.1": "localhost", **self.names}
        (etc / "hosts").write_text("".join(f"{address} {name}\n" for address, name in known.items()))
        for name in _MASKED:
            _link("/dev/null", units / f"{name}.service")
        _link("/lib/systemd/system/multi-user.target", units / "default.target")
        (units / "network.service").write_text(_NETWORK_UNIT.format(address=self.address))
        wants = units / "multi-user.target.wants"
        wants.mkdir()
        _link("/etc/systemd/system/network.service", wants / "network.service")

    def boot(self) -> None:
        """Power on; `wait_booted` waits for it."""
        # The last boot's may still be there: the kernel keeps its network until it gives up its last packets.
        subprocess.run(["ip", "link", "delete", self._link], check=False, stderr=subprocess.DEVNULL)
        joins = " && ".join(f"echo $$ >{folder}/cgroup.procs" for folder in cgroups.make(self._cgroup))
        # systemd-nspawn wants /run/systemd/nspawn on a file system of its own.
        prepare = "mkdir -p /run/systemd/nspawn && mount -t tmpfs tmpfs /run/systemd/nspawn"
        script = f'{joins} && {prepare} && exec "$@"'
        with (self.folder / "console.log").open("ab") as console:
            self._nspawn = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", script, "sh", *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )

    def _command(self) -> list[str]:
        return [
            "systemd-nspawn",
            "--quiet",
            "--boot",
            f"--directory={self.root}",
            f"--machine={self.name}",
            f"--hostname={self.name}",
            f"--network-bridge={BRIDGE}",
            "--register=no",
            "--keep-unit",
            "--console=pipe",
            "--resolv-conf=off",
            "--timezone=off",
            "--link-journal=no",
            "--kill-signal=SIGRTMIN+3",
            "--system-call-filter=bpf",
            "--capability=CAP_IPC_LOCK",
            *(f"--bind-ro={source}:{target}" for source, target in self.binds.items()),
        ]

    def wait_booted(self) -> None:
        """Until it is up; what it runs for the cluster may still be starting."""
        until_s = time.monotonic() + BOOT_TIMEOUT_S
        while not self._is_up():
            assert self._nspawn is not None
            if self._nspawn.poll() is not None or time.monotonic() > until_s:
                console = (self.folder / "console.log").read_text(errors="replace")[-3000:]
                raise AssertionError(f"host {self.name} did not boot:\n{console}")
            time.sleep(_POLL_S)

    def _is_up(self) -> bool:
        assert self._nspawn is not None
        pid = self._nspawn.pid
        with suppress(OSError):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if children:
                self._leader = int(children[0])
                return self._enter(["systemctl", "is-active", "multi-user.target"]).returncode == 0
        return False

    def cut_cable(self) -> None:
        """Nothing reaches it, and nothing comes from it."""
        _call("ip", "link", "set", self._link, "down")

    def plug_cable(self) -> None:
        """After `cut_cable`."""
        _call("ip", "link", "set", self._link, "up")

    def cut_power(self) -> None:
        """All of it is gone at once, and nobody is told; what was written to its disk stays."""
        assert self._nspawn is not None
        self.cut_cable()
        cgroups.kill(self._cgroup)
        self._nspawn.wait(RUN_TIMEOUT_S)

    def reboot(self) -> None:
        """As an administrator does it: in order."""
        assert self._nspawn is not None
        self._enter(["systemctl", "reboot"])
        self._nspawn.wait(RUN_TIMEOUT_S)
        cgroups.kill(self._cgroup)
        self.boot()
        self.wait_booted()

    # ---- commands ----------------------------------------------------------------------------------

    def run(self, command: str | Sequence[str]) -> str:
        """Run a command there as root; returns what it wrote.

        Raises:
            CommandFailed: it did not end well.
        """
        words = ["sh", "-c", command] if isinstance(command, str) else list(command)
        done = self._enter(words)
        if done.returncode != 0:
            shown = command if isinstance(command, str) else shlex.join(command)
            said = f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
            raise CommandFailed(f"{self.name}$ {shown}\n{said}")
        return done.stdout

    def succeeds(self, command: str) -> bool:
        """Whether that command ends well there."""
        return self._enter(["sh", "-c", command]).returncode == 0

    def _enter(self, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        namespaces = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup")
        into = ["nsenter", f"--target={self._leader}", *namespaces]
        environ = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        return subprocess.run(
            [*into, "--", *words],
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
            check=False,
        )


def make_bridge(address: str) -> None:
    """The switch that all hosts are plugged into, in this network namespace, where `address` is ours."""
    _call("ip", "link", "set", "lo", "up")
    _call("ip", "link", "add", BRIDGE, "type", "bridge")
    _call("ip", "address", "add", f"{address}/24", "dev", BRIDGE)
    _call("ip", "link", "set", BRIDGE, "up")


def _call(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def _link(target: str, at: Path) -> None:
    at.unlink(missing_ok=True)
    os.symlink(target, at)
