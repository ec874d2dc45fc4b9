"""What docs/deploy.md has an administrator do on a bare host, done."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tests.hosts.host import Host

REPOSITORY: Final = Path(__file__).parents[2]
PYTHON: Final = "/opt/kvrelay-python"
"""Where hosts see this interpreter: under /root, where it may be, a hardened service can't run it."""
DEPENDENCIES: Final = "/opt/kvrelay-dependencies"
"""Where hosts see what is installed beside kvrelay: they have no network to fetch it from."""
MODEL: Final = "/models/smollm2"
_DROP_IN: Final = f"[Service]\nEnvironment=LD_LIBRARY_PATH={PYTHON}/lib\n"
"""An interpreter that was built for another place looks there for its library."""
_INTERPRETER: Final = f"{PYTHON}/bin/python{sys.version_info.major}.{sys.version_info.minor}"


def binds(model: Path) -> dict[Path, str]:
    """What hosts see of this machine."""
    return {
        Path(sys.base_prefix): PYTHON,
        Path(sysconfig.get_path("purelib")): DEPENDENCIES,
        model: MODEL,
    }


def build_wheel(folder: Path) -> Path:
    """A wheel of this checkout, built of a copy, so that nothing that was built there before gets into it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    source = folder / "source"
    for name in filter(None, listed):
        if (REPOSITORY / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, source / name, follow_symlinks=False)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    built = subprocess.run(build, check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(host: Host, wheel: Path, configs: Iterable[str], router: str) -> None:
    """kvrelay, its user, its units, and `configs` (names in deploy/config) for the router at `router`."""
    put(host, wheel, f"/root/{wheel.name}")
    host.run(f"{_INTERPRETER} -m venv --without-pip /opt/kvrelay")
    host.run(f"echo {DEPENDENCIES} >$(ls -d /opt/kvrelay/lib/python*/site-packages)/dependencies.pth")
    pip = "/opt/kvrelay/bin/python -m pip --quiet --disable-pip-version-check --no-cache-dir"
    wheel_flags = "--root-user-action=ignore --no-index --no-deps --ignore-installed"
    host.run(f"{pip} install {wheel_flags} /root/{wheel.name}")
    put(host, REPOSITORY / "deploy/systemd/kvrelay.sysusers.conf", "/usr/lib/sysusers.d/kvrelay.conf")
    host.run("systemd-sysusers")
    for unit in (REPOSITORY / "deploy/systemd").iterdir():
        if unit.suffix in (".service", ".socket", ".target"):
            put(host, unit, f"/etc/systemd/system/{unit.name}")
    write(host, "/etc/systemd/system/kvrelay-.service.d/interpreter.conf", _DROP_IN)
    host.run("mkdir -p /etc/kvrelay")
    for name in configs:
        text = (REPOSITORY / "deploy/config" / name).read_text()
        text = text.replace('"host-a:7070"', f'"{router}"').replace('model = "smollm2"', f'model = "{MODEL}"')
        text = text.replace("[transfer]", '[transfer]\ntransport = "tcp"')
        write(host, f"/etc/kvrelay/{name}", text)
        host.run(f"/opt/kvrelay/bin/kvrelay config check /etc/kvrelay/{name}")
    host.run("systemctl daemon-reload")


def put(host: Host, file: Path, at: str) -> None:
    """Copy a file of this machine to a host."""
    write(host, at, file.read_bytes())


def write(host: Host, at: str, content: str | bytes) -> None:
    """Write a file of a host, readable for all."""
    target = host.root / at.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content.encode() if isinstance(content, str) else content)
    target.chmod(0o644)
