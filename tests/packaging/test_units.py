"""The systemd units are sound, hardened as far as they say, and fit to the settings that they run with."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvrelay.cli.config_file import load_config
from kvrelay.node.service import CLOSE_TIMEOUT_S as NODE_CLOSE_TIMEOUT_S
from kvrelay.openai_proxy.main import STOP_MARGIN_S
from kvrelay.router.server import CLOSE_TIMEOUT_S as ROUTER_CLOSE_TIMEOUT_S

REPOSITORY = Path(__file__).parents[2]
UNITS = REPOSITORY / "deploy" / "systemd"
CONFIGS = REPOSITORY / "deploy" / "config"
INSTALLED = "/opt/kvrelay/bin/kvrelay"
SERVICES = {"router": "a", "prefill": "0", "decode": "0", "proxy": "a"}
"""Role -> the instance that docs/deploy.md runs."""
SECTIONS = {"router": "router", "prefill": "node", "decode": "node", "proxy": "proxy"}
CLOSE_TIMEOUTS_S = {
    "router": ROUTER_CLOSE_TIMEOUT_S,
    "prefill": NODE_CLOSE_TIMEOUT_S,
    "decode": NODE_CLOSE_TIMEOUT_S,
    "proxy": 2 * STOP_MARGIN_S,
}
EXPOSURE_MAX = {"router": 1.5, "prefill": 2.5, "decode": 2.5, "proxy": 1.5}
"""What `systemd-analyze security` may say, of 10."""

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


class OneValue(dict):
    """A section whose keys may come several times: their values are joined."""

    def __setitem__(self, key: object, value: object) -> None:
        if isinstance(value, list) and key in self:
            value = [*self[key], *value]
        super().__setitem__(key, value)


def service_section(role: str) -> dict[str, list[str]]:
    parser = configparser.RawConfigParser(dict_type=OneValue, strict=False, interpolation=None)
    parser.optionxform = str
    parser.read(UNITS / f"kvrelay-{role}@.service")
    return {key: value.split("\n") for key, value in parser["Service"].items()}


@needs_systemd
def test_systemd_finds_no_fault_in_the_units(tmp_path: Path) -> None:
    for unit in UNITS.iterdir():
        if unit.suffix != ".conf":
            # What is verified must exist: the command is not installed here.
            (tmp_path / unit.name).write_text(unit.read_text().replace(INSTALLED, shutil.which("true")))
    names = [f"kvrelay-{role}@{instance}.service" for role, instance in SERVICES.items()]
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names, "kvrelay-proxy@a.socket", "kvrelay.target"],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert "kvrelay" not in verified.stdout + verified.stderr
    assert verified.returncode == 0


@needs_systemd
@pytest.mark.parametrize("role", SERVICES)
def test_a_unit_exposes_no_more_than_it_must(role: str) -> None:
    judged = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", UNITS / f"kvrelay-{role}@.service"],
        check=False,
        capture_output=True,
        text=True,
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", judged.stdout)
    assert found, judged.stdout + judged.stderr
    assert float(found[1]) <= EXPOSURE_MAX[role]


@pytest.mark.parametrize("role", SERVICES)
def test_a_unit_runs_with_the_configuration_that_is_shipped_beside_it(role: str) -> None:
    (command,) = service_section(role)["ExecStart"]
    config_file = f"{role}-{SERVICES[role]}.toml"
    asked = command.replace("%i", SERVICES[role])
    assert asked.startswith(f"{INSTALLED} {role} --config /etc/kvrelay/{config_file}")
    load_config(CONFIGS / config_file, {}, (SECTIONS[role],), "prefill")


@pytest.mark.parametrize("role", SERVICES)
def test_a_drain_ends_before_systemd_loses_patience(role: str) -> None:
    section = SECTIONS[role]
    needed = ("engine", "transfer", section) if section == "node" else (section,)
    loaded = load_config(CONFIGS / f"{role}-{SERVICES[role]}.toml", {}, needed)
    service = service_section(role)
    drain_s = loaded.built[section].drain_timeout_s + CLOSE_TIMEOUTS_S[role]
    assert float(service["TimeoutStopSec"][0]) >= drain_s
    assert service["KillMode"] == ["mixed"]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_nodes_of_one_host_can_exchange_kv(role: str) -> None:
    """By CUDA IPC, shared memory and process_vm_readv: see the unit's own words."""
    service = service_section(role)
    forbidden = (
        "PrivateIPC",
        "PrivateUsers",
        "PrivatePIDs",
        "DynamicUser",
        "PrivateDevices",
        "PrivateNetwork",
    )
    assert not [key for key in forbidden if key in service]
    assert service["User"] == ["kvrelay"]
    assert service["LimitMEMLOCK"] == ["infinity"]
    assert "char-nvidia* rw" in service["DeviceAllow"]
