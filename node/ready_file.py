"""A file that says that a service is ready, and under which addresses."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path


def write_ready_file(path: Path, facts: Mapping[str, str | int]) -> None:
    """Write `facts` as JSON; a reader sees the whole file or none.

    Raises:
        OSError: the folder can't be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(facts))
    partial.replace(path)
