"""Tokenizer bundles on disk, by digest: fetched once per machine, shared by its processes."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Final

from kvrelay.core.tokenizer_chunk import MAX_TOKENIZER_BYTES, tokenizer_digest

MAX_FILES: Final = 32
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class TokenizerCache:
    """Bundles in one folder. A cache that can't be read or written is as good as empty: nothing raises."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def read(self, digest: str) -> bytes | None:
        """The bundle, verified; None if it is not here. A damaged file is removed."""
        path = self._path(digest)
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                bundle = file.read(MAX_TOKENIZER_BYTES + 1)
        except OSError:
            return None
        if tokenizer_digest(bundle) == digest:
            return bundle
        with suppress(OSError):
            path.unlink()
        return None

    def write(self, digest: str, bundle: bytes) -> None:
        """Keep a verified bundle; readers see all of it or nothing. The oldest go beyond `MAX_FILES`."""
        path = self._path(digest)
        if path is None:
            return
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(path, bundle)
            self._prune(path.parent)

    def _path(self, digest: str) -> Path | None:
        # The digest comes from a router: nothing else may become part of a path.
        if self._folder is None or not _DIGEST.fullmatch(digest):
            return None
        return self._folder / f"{digest}.bundle"

    def _prune(self, folder: Path) -> None:
        newest_first = sorted(folder.glob("*.bundle"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in newest_first[MAX_FILES:]:
            path.unlink(missing_ok=True)


def _write_whole(path: Path, data: bytes) -> None:
    with NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as part:
        try:
            part.write(data)
            part.flush()
            os.replace(part.name, path)
        except BaseException:
            os.unlink(part.name)
            raise
