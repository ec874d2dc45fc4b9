"""Whether this machine can boot hosts at all, and the namespaces that they live in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

_COMMANDS: Final = {
    "systemd-nspawn": "systemd-container",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "ip": "iproute2",
    "curl": "curl",
}
_NAMESPACES: Final = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
_TRIAL: Final = (
    'd=$(mktemp -d) && mount -t tmpfs tmpfs "$d" && mkdir "$d/u" "$d/w" "$d/r"'
    ' && mount -t overlay -o "lowerdir=/,upperdir=$d/u,workdir=$d/w" overlay "$d/r"'
    " && ip link add kvrelay-try type bridge"
)


def why_not() -> str | None:
    """Why no hosts can be booted here; None: they can."""
    if sys.platform != "linux":
        return f"hosts are booted with systemd-nspawn, and this is {sys.platform}"
    if os.geteuid() != 0:
        return "it needs root"
    for command, package in _COMMANDS.items():
        if shutil.which(command) is None:
            return f"{command} is not installed (Debian: apt-get install --no-install-recommends {package})"
    tried = subprocess.run(in_namespaces(["sh", "-c", _TRIAL]), check=False, capture_output=True, text=True)
    if tried.returncode != 0:
        return f"no namespaces, overlays or bridges can be made here: {tried.stderr.strip()}"
    return None


def in_namespaces(command: Sequence[str]) -> list[str]:
    """`command` with mounts, a network and process ids of its own: whatever it leaves is gone when it ends,
    and it ends when its parent does."""
    return [*_NAMESPACES, "--", *command]
