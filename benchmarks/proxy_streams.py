"""What the OpenAI proxy costs: chat completions over `sim` nodes at 1, 32 and 256 streams, beside a bare ASGI
application that streams the very same bytes from memory on the same server (the ceiling).

    python -m benchmarks.proxy_streams [--json] [--seconds 6] [--step-ms 20] [--streams 1 32 256]

Three things: streamed events a second at the pace of the decode step with the CPU of the serving process per
event; the same unpaced (whoever is slowest, proxy, router, node or reader on these cores, sets the pace); and
whole answers a second of one token each. CPU is the scheduler's nanosecond count of the process alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.local_cluster import LocalService, running_service, wait_for_file
from benchmarks.router_session import ROUTER_FLAGS

MAX_TOKENS = 1024
Figures = dict[str, float]


def cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a process."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def completion_body(max_tokens: int, *, stream: bool) -> bytes:
    """A chat request."""
    messages = [{"role": "user", "content": "Name three rivers, and say where each of them ends. " * 4}]
    body = {"messages": messages, "max_tokens": max_tokens, "ignore_eos": True, "stream": stream}
    return json.dumps(body).encode()


def measure(
    service: LocalService, folder: Path, path: str, body: bytes, streams: int, seconds: float
) -> Figures:
    """Ask `streams` times at once; what came, and what it cost the serving process."""
    body_file, began = folder / "body.json", folder / "began"
    body_file.write_bytes(body)
    command = [sys.executable, "-m", "benchmarks.http_streams", service.ready["http_address"]]
    command += ["--streams", str(streams), "--seconds", str(seconds), "--path", path]
    reader = subprocess.Popen(
        [*command, "--body", str(body_file), "--began", str(began)], stdout=subprocess.PIPE, text=True
    )
    while not began.exists() and reader.poll() is None:
        time.sleep(0.005)
    before_s = cpu_s(service.pid)
    while began.exists():
        time.sleep(0.005)
    used_s = cpu_s(service.pid) - before_s
    found = json.loads(reader.communicate()[0])
    if found["failed"] or reader.returncode:
        sys.exit(f"{found['failed']} answers failed")
    return {
        "events_per_s": found["events"] / found["seconds"],
        "answers_per_s": found["answers"] / found["seconds"],
        "cpu_us_per_event": used_s / max(1, found["events"]) * 1e6,
        "cpu_ms_per_answer": used_s / max(1, found["answers"]) * 1e3,
        "cpu_percent": 100 * used_s / found["seconds"],
    }


def record_events(address: str) -> list[str]:
    """One whole streamed answer, an event a line, in hex."""
    request = urllib.request.Request(
        f"http://{address}/v1/chat/completions",
        completion_body(MAX_TOKENS, stream=True),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        whole: bytes = answer.read()
    return [(part + b"\n\n").hex() for part in whole.split(b"\n\n") if part]


@contextmanager
def proxy_over_sim(step_ms: float, max_streams: int) -> Iterator[LocalService]:
    """Router, one prefill and one decode node, and a proxy."""
    with ExitStack() as stack:
        router = stack.enter_context(running_service("router", ROUTER_FLAGS))
        address = router.ready["grpc_address"]
        flags = [
            f"--router={address}",
            "--model=sim",
            "--tokenizer=smollm2",
            "--log-level=warning",
            f"--num-blocks={(max_streams + 8) * (MAX_TOKENS // 16 + 8)}",
            f"--max-num-seqs={max_streams + 8}",
            "--max-num-batched-tokens=8192",
            f"--max-waiting={4 * max_streams + 64}",
            "--sim-prefill-base-s=0",
            "--sim-prefill-token-s=0",
            f"--sim-decode-base-s={step_ms / 1e3}",
            "--sim-decode-seq-s=0",
        ]
        for role in ("prefill", "decode"):
            stack.enter_context(running_service(role, flags))
        proxy_flags = [f"--router={address}", "--host=127.0.0.1", "--port=0", "--log-level=warning"]
        yield stack.enter_context(running_service("proxy", proxy_flags))


@contextmanager
def bare_app(events: list[str], step_ms: float) -> Iterator[LocalService]:
    """The ceiling."""
    with tempfile.TemporaryDirectory() as folder:
        ready_file, events_file = Path(folder) / "ready.json", Path(folder) / "events"
        events_file.write_text("\n".join(events))
        command = [sys.executable, "-m", "benchmarks.bare_asgi", str(ready_file)]
        process = subprocess.Popen([*command, "--events", str(events_file), "--step-ms", str(step_ms)])
        try:
            wait_for_file(ready_file, process, ready_file)
            yield LocalService("bare", process.pid, json.loads(ready_file.read_text()))
        finally:
            process.kill()
            process.wait()


def run(args: argparse.Namespace, step_ms: float) -> dict[str, Figures]:
    """All rows of one pace."""
    rows: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as name, proxy_over_sim(step_ms, max(args.streams)) as proxy:
        folder = Path(name)
        events = record_events(proxy.ready["http_address"])
        streamed = completion_body(MAX_TOKENS, stream=True)
        with bare_app(events, step_ms) as bare:
            for streams in args.streams:
                for who, service in (("proxy", proxy), ("bare", bare)):
                    found = measure(service, folder, "/v1/chat/completions", streamed, streams, args.seconds)
                    rows[f"{who}, {streams} streams"] = found
        if step_ms == 0:
            whole = completion_body(1, stream=False)
            with bare_app(events[:1], 0) as bare:
                for streams in args.streams:
                    for who, service, path in (
                        ("proxy", proxy, "/v1/chat/completions"),
                        ("bare", bare, "/whole"),
                    ):
                        found = measure(service, folder, path, whole, streams, args.seconds)
                        rows[f"{who}, {streams} callers, one token"] = found
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32, 256])
    args = parser.parse_args()
    figures = {"paced": run(args, args.step_ms), "unpaced": run(args, 0.0)}
    if args.json:
        print(json.dumps(figures))
        return
    for pace, rows in figures.items():
        print(f"{pace}, a decode step of {args.step_ms:g} ms" if pace == "paced" else pace)
        names = list(next(iter(rows.values())))
        print(f"{'':36}" + "".join(f"{name:>20}" for name in names))
        for who, row in rows.items():
            print(f"{who:36}" + "".join(f"{row[name]:>20.2f}" for name in names))


if __name__ == "__main__":
    main()
