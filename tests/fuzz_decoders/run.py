"""``python -m tests.fuzz_decoders.run --seconds N``: each decoder of what comes over a wire, with atheris.

Prints how many inputs each was given. Ends non-zero if one raised what it may not; the input stays in the
folder that is named then.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp

from tests.fuzz_decoders.seeds import seeds
from tests.fuzz_decoders.targets import TARGETS


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=20, help="for each decoder")
    seconds = parser.parse_args().seconds
    folder, num_failed = Path(mkdtemp(prefix="kvrelay-fuzz-")), 0
    for name in TARGETS:
        num_failed += not _fuzz(name, folder, seconds)
    print(f"{len(TARGETS)} decoders, {num_failed} with findings")
    return 1 if num_failed else 0


def _fuzz(name: str, folder: Path, seconds: int) -> bool:
    """Whether nothing was found."""
    corpus = folder / name
    corpus.mkdir()
    for number, data in enumerate(seeds()[name]):
        (corpus / f"seed-{number}").write_bytes(data)
    command = [sys.executable, "-m", "tests.fuzz_decoders.one", name, str(corpus), str(seconds)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    said = ran.stdout + ran.stderr
    executed = re.search(r"number_of_executed_units: (\d+)", said)
    is_well = ran.returncode == 0 and executed is not None
    print(f"{name:16} {executed.group(1) if executed else 'no'} inputs", flush=True)
    if not is_well:
        print(f"{said[-4000:]}\nthe input is in {corpus}", flush=True)
    return is_well


if __name__ == "__main__":
    raise SystemExit(main())
