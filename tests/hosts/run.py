"""Three systemd hosts on this machine, from bare to an answer, and what then happens to hosts: from the
repository's root, as root, ``python -m tests.hosts.run``. Where that can't be, it says why and ends well.

The hosts live in mount, network and process namespaces of their own, so whatever happens, their mounts,
networks and processes end with the story; cgroups and the folder are removed here.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Final

from kvrelay.engine.embedded_model import ensure_smollm2
from tests.hosts import cgroups
from tests.hosts.install import build_wheel
from tests.hosts.machine import in_namespaces, why_not

TIMEOUT_S: Final = 900.0
"""Of the whole story; it takes two to three minutes on two cores."""
NAMES: Final = ("host-a", "host-b", "host-c")


def main() -> int:
    """Returns the exit status: 0 also where no hosts can be booted."""
    reason = why_not()
    if reason is not None:
        print(f"SKIPPED: no systemd hosts are booted: {reason}")
        return 0
    signal.signal(signal.SIGTERM, _stop_in_order)
    model = ensure_smollm2()
    with tempfile.TemporaryDirectory(prefix="kvrelay-hosts-") as folder:
        wheel = build_wheel(Path(folder))
        command = [sys.executable, "-m", "tests.hosts.story", folder, str(wheel), str(model)]
        with subprocess.Popen(in_namespaces(command)) as story:
            try:
                return story.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                print(f"FAILED: the story took longer than {TIMEOUT_S:g} s")
                return 1
            finally:
                story.kill()  # and with it goes all that is in its namespaces
                story.wait()
                for name in NAMES:
                    cgroups.kill(cgroups.name_of(name))
                    cgroups.remove(cgroups.name_of(name))


def _stop_in_order(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
