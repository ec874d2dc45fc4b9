"""From a kernel's Python source to something to call with sizes and addresses."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from struct import Struct
from threading import Lock
from typing import Final

import llvmlite.binding
import numba
import torch
from numba import cfunc, types

from kvrelay.core.errors import ConfigError
from kvrelay.engine.compiled.arithmetic import FAST_MATH, Integers
from kvrelay.engine.compiled.openmp import OpenMP
from kvrelay.engine.embedded_model import default_cache_dir

KernelFunction = Callable[[Integers], None]
"""Compiled before it is called: it may use what `kvrelay.engine.compiled` has for kernels, and no objects."""

_SIGNATURE: Final = types.void(types.CPointer(types.int64))
_MAX_ARGUMENTS: Final = 16
_PACKINGS: Final = tuple(Struct(f"={num}q") for num in range(_MAX_ARGUMENTS + 1))
_SHARED_ELEMENTS_MIN: Final = 16384
"""Less to read or write than this is done by the calling thread; waking others costs as much."""
_KERNEL_CALL: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_compile_lock: Final = Lock()
"""Where numba keeps compiled code is a setting of the process."""


class Kernel:
    """A compiled kernel and the memory for its arguments, so for one thread at a time.

    Compiling takes a second at most; other processes of the same user then find the result in the cache.
    `variant` names the constants that `function` was built with.
    """

    def __init__(self, openmp: OpenMP, function: KernelFunction, variant: str) -> None:
        self._openmp = openmp
        self.compiled: Final = _compile(function, variant)
        self._address: int = self.compiled.address
        self._call = _KERNEL_CALL(self._address)
        self._arguments = (ctypes.c_int64 * _MAX_ARGUMENTS)()
        self._arguments_address = ctypes.addressof(self._arguments)

    def __call__(self, num_elements: int, *arguments: int) -> None:
        """`num_elements`, the size of the work, decides whether torch's threads share it.

        All of them or none: libgomp ends the threads that a smaller team leaves out, and makes new ones for
        the next larger team.
        """
        _PACKINGS[len(arguments)].pack_into(self._arguments, 0, *arguments)
        num_threads = torch.get_num_threads() if num_elements >= _SHARED_ELEMENTS_MIN else 1
        if num_threads == 1:
            self._call(self._arguments_address)
        else:
            self._openmp.run(self._address, self._arguments_address, num_threads)


def _compile(function: KernelFunction, variant: str) -> numba.core.ccallback.CFunc:
    with _compile_lock:
        folder, before = _cache_folder(variant), numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(folder or "")
        try:
            return _decorate(function, cache=folder is not None)
        except (EOFError, OSError, UnpicklingError):  # As a power cut or a full disk leaves it.
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            return _decorate(function, cache=False)
        finally:
            numba.config.CACHE_DIR = before


def _decorate(function: KernelFunction, cache: bool) -> numba.core.ccallback.CFunc:
    return cfunc(_SIGNATURE, fastmath=FAST_MATH, error_model="numpy", cache=cache)(function)


def _cache_folder(variant: str) -> Path | None:
    """One for each state of the sources, kind of CPU and variant; None: there can't be any.

    A folder of its own for each variant, since numba's index of a folder can mix two entries up when two
    processes add them at once. Only our own folder, since reading it can run code.
    """
    try:
        folder = default_cache_dir(os.environ) / "kernels" / _digest() / variant
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_own = folder.stat().st_uid == os.geteuid() and os.access(folder, os.W_OK)
    except (ConfigError, OSError):
        return None
    return folder if is_own else None


def _digest() -> str:
    """numba itself looks only at the file that a function is in, not at those that it imports from."""
    digest = sha256(f"{numba.__version__} {llvmlite.binding.get_host_cpu_name()}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
