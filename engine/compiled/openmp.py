"""The threads that torch's operations run on, for kernels of our own.

numba's threading layers each bring threads of their own, which would take turns with torch's on the same
cores. So kernels are handed to the OpenMP library that torch is linked to: the same team, of the same size,
which spins after its work no longer than torch's does.
"""

from __future__ import annotations

import ctypes
from typing import Final

import llvmlite.binding
import torch
from numba import njit, types

_THREAD_NUM: Final = "omp_get_thread_num"
_NUM_THREADS: Final = "omp_get_num_threads"

_thread_num = types.ExternalFunction(_THREAD_NUM, types.int32())
_num_threads = types.ExternalFunction(_NUM_THREADS, types.int32())


class OpenMP:
    """Runs kernels on the calling thread's OpenMP team.

    Raises:
        AttributeError: this torch was built without OpenMP, or with one that lacks GCC's entry points.
        ImportError: torch's threads are another library's.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(torch._C.__file__)  # Symbols are looked up in what it is linked to, too.
        for name in (_THREAD_NUM, _NUM_THREADS):
            address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
            llvmlite.binding.add_symbol(name, address)
        if not _runs_torch(library):
            raise ImportError("torch runs on another OpenMP library than it is linked to")
        # Source: libgomp's and LLVM's ABI, stable since GCC 4.9 (OpenMP 4.0).
        self._parallel = library.GOMP_parallel
        self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._parallel.restype = None

    def run(self, kernel: int, arguments: int, num_threads: int) -> None:
        """Call ``kernel(arguments)``, both addresses, on that many threads, and wait for them all."""
        self._parallel(kernel, arguments, num_threads, 0)


def _runs_torch(library: ctypes.CDLL) -> bool:
    """Whether the calling thread's team has one size there and in torch: a preloaded library may be what
    torch really calls, and two teams would take turns on the same cores."""
    num_threads = torch.get_num_threads()
    library.omp_set_num_threads(num_threads + 1)
    try:
        return torch.get_num_threads() == num_threads + 1
    finally:
        library.omp_set_num_threads(num_threads)


@njit
def thread_index() -> int:
    """The calling thread's number in its team."""
    index: int = types.int64(_thread_num())
    return index


@njit
def own_share(num_items: int) -> tuple[int, int]:
    """``(first, end)`` of the items that are the calling thread's."""
    index, num_threads = types.int64(_thread_num()), types.int64(_num_threads())
    return num_items * index // num_threads, num_items * (index + 1) // num_threads
