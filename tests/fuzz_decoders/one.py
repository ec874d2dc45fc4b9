"""``python -m tests.fuzz_decoders.one TARGET CORPUS SECONDS``: fuzz one decoder, guided by coverage."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["kvrelay", "tests.fuzz_decoders"]):
    from tests.fuzz_decoders.targets import TARGETS


def main() -> None:
    """Ends the process: 0, or not 0 with the input that raised."""
    name, corpus, seconds = sys.argv[1:]
    options = [
        f"-max_total_time={seconds}",
        "-max_len=4096",
        f"-artifact_prefix={corpus}/found-",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, "-print_final_stats=1", corpus], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
