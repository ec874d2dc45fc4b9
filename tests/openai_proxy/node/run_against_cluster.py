"""Runs the tests of the Node SDK against a cluster of real processes, which is gone in the end: from the
repository's root, ``python -m tests.openai_proxy.node.run_against_cluster``. Ends non-zero when one fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

from tests.openai_proxy.running_services import running_up

FOLDER = Path(__file__).parent


def main() -> int:
    """Returns the exit status of the tests."""
    signal.signal(signal.SIGTERM, _stop_in_order)
    with (
        tempfile.TemporaryDirectory(prefix="kvrelay-node-tests-") as folder,
        running_up(Path(folder)) as running,
    ):
        environ = {**os.environ, "KVRELAY_BASE_URL": running.base_url}
        command = ["node", "--test", "--test-reporter=spec", "proxy.test.mjs"]
        return subprocess.run(command, cwd=FOLDER, env=environ, check=False).returncode


def _stop_in_order(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
