"""Asks a whole cluster what its OpenAPI document allows, and what it does not: no answer may be a 5xx.

``python -m tests.openai_proxy.fuzz.run SCHEMATHESIS [its options]``, where SCHEMATHESIS is the program.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.request import urlopen

from tests.openai_proxy.running_services import running_up

MAX_EXAMPLES = 150
"""Of each operation and kind of test."""
TIME_LIMIT_S = 300
CLUSTER = ("--model", "sim", "--tokenizer", "smollm2")
HERE = Path(__file__).parent


def main() -> int:
    """Returns schemathesis' exit status: 0, nothing was found."""
    schemathesis, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder, running_up(Path(folder), *CLUSTER) as up:
        command = [
            schemathesis, "run", up.base_url.removesuffix("/v1") + "/openapi.json",
            "--checks", "not_a_server_error", "--mode", "all", "--phases", "examples,coverage,fuzzing",
            "--max-examples", str(MAX_EXAMPLES), "--request-timeout", "30", "--workers", "1",
            "--suppress-health-check", "all", "--generation-database", "none", "--output-sanitize", "false",
            *options,
        ]  # fmt: skip
        environ = {**os.environ, "SCHEMATHESIS_HOOKS": str(HERE / "bounds.py")}
        status = subprocess.run(command, env=environ, check=False, timeout=TIME_LIMIT_S).returncode
        return _check_answers(up.base_url) or status


def _check_answers(base_url: str) -> int:
    """A run that met refusals alone has tested little: every path must have answered some requests."""
    with urlopen(base_url.removesuffix("/v1") + "/metrics", timeout=30) as response:
        text = response.read().decode()
    pattern = r'kvrelay_proxy_requests_total{path="(.*?)",status="(\d+)"} ([\d.]+)'
    found = [(path, status, float(number)) for path, status, number in re.findall(pattern, text)]
    for path, status, number in sorted(found):
        print(f"{path:<24} {status} {number:>7.0f}")
    silent = {path for path, _, _ in found} - {path for path, status, _ in found if status == "200"}
    silent -= {"other"}
    print(f"never answered with 200: {sorted(silent)}" if silent else "every path answered")
    return 1 if silent else 0


if __name__ == "__main__":
    sys.exit(main())
