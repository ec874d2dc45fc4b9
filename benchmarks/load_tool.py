"""An independent load tool, guidellm, against a whole cluster with its OpenAI proxy: no request may fail.

    python -m benchmarks.load_tool --guidellm .venv-load/bin/guidellm [--target URL]

Starts `kvrelay up` unless `--target` names a proxy that runs. Ends non-zero when a request failed, or when
fewer were answered than were asked for. `make test-load` installs guidellm and runs this.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvrelay.engine.embedded_model import ensure_smollm2

START_TIMEOUT_S = 300.0


@contextmanager
def running_up(folder: Path) -> Iterator[str]:
    """`kvrelay up` on free ports; yields the proxy's URL."""
    command = [sys.executable, "-m", "kvrelay.cli", "up", "--port", "0", "--num-blocks", "2048"]
    process = subprocess.Popen([*command, "--log-dir", str(folder)], stderr=subprocess.DEVNULL)
    try:
        ready_file, deadline_s = folder / "proxy.ready.json", time.monotonic() + START_TIMEOUT_S
        while not ready_file.exists():
            if process.poll() is not None or time.monotonic() > deadline_s:
                sys.exit(f"kvrelay up did not start; its logs are in {folder}")
            time.sleep(0.1)
        yield f"http://{json.loads(ready_file.read_text())['http_address']}"
    finally:
        process.terminate()
        process.wait(60)


def run_guidellm(args: argparse.Namespace, target: str, report: Path) -> dict[str, object]:
    """One benchmark of synthetic prompts; its report."""
    command = [
        *(args.guidellm, "run", "--disable-progress"),
        *("--backend", f"kind=openai_http,target={target}"),
        *("--profile", f"kind=concurrent,streams={args.streams}"),
        *("--constraint", f"kind=max_requests,count={args.requests}"),
        *("--tokenizer", f"kind=huggingface_auto,model={ensure_smollm2()}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={args.prompt_tokens},output_tokens={args.tokens}"),
        *("--output", f"kind=json,path={report}"),
    ]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=report.parent)
    found: dict[str, object] = json.loads(report.read_text())["benchmarks"][0]["requests"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guidellm", required=True, help="path of the command")
    parser.add_argument("--target", help="URL of a proxy that runs already")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    args.guidellm = str(Path(args.guidellm).absolute())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.target:
            requests = run_guidellm(args, args.target, folder / "report.json")
        else:
            with running_up(folder) as target:
                requests = run_guidellm(args, target, folder / "report.json")
    numbers = {kind: len(of_kind) for kind, of_kind in requests.items() if isinstance(of_kind, list)}
    print(f"guidellm: {numbers}")
    if numbers["errored"] or numbers["successful"] < args.requests:
        sys.exit("not every request was answered")


if __name__ == "__main__":
    main()
