"""Launches of Triton kernels that cost the CPU a fraction of what Triton's own way costs it.

``kernel[grid](...)`` binds and inspects every argument anew, in Python, to find the machine code that it has
compiled for such arguments. A prefill step makes hundreds of launches, whose arguments differ in addresses
alone, and with a short prompt the device is done with each before the next is queued.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias

from torch import Tensor

Grid: TypeAlias = tuple[int, int, int]
Constants: TypeAlias = tuple[int | float, ...]

_POINTER_ALIGNMENT: Final = 16
"""Triton compiles kernels for pointers that are multiples of it apart from others."""
MAX_HANDLES: Final = 256
"""Of one kernel; with none every launch goes Triton's way."""
_KNOWN_VERSIONS: Final = ((3, 4), (3, 7))
"""Of Triton: from, to; their compiled kernels are all called in the same way."""

_log = logging.getLogger(__name__)


class _Handle(NamedTuple):
    """What Triton calls in the end."""

    run: Callable[..., object]
    function: int
    metadata: object
    stream_of: Callable[[int], int]


class CompiledLaunch:
    """Launches one kernel, whose parameters are pointers and behind them ``tl.constexpr`` alone.

    Which machine code fits then depends on the device, the constants, the pointers' types and on whether they
    are multiples of 16. Handles are kept where all are, for up to `MAX_HANDLES` sets of the rest; other
    launches go Triton's way, as all do with a Triton whose handles are not known. Hooks that profilers put
    into Triton see only those.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._handles: dict[tuple[object, ...], _Handle] = {}

    def __call__(
        self, grid: Grid, pointers: tuple[Tensor, ...], constants: Constants, num_warps: int = 4
    ) -> None:
        """Queue it on the current stream of the pointers' device, which is the current one."""
        addresses = [pointer.data_ptr() for pointer in pointers]
        device = pointers[0].get_device()
        key = (device, num_warps, constants, *[pointer.dtype for pointer in pointers])
        handle = self._handles.get(key)
        if handle is None or not _are_aligned(addresses):
            compiled = self._kernel[grid](*pointers, *constants, num_warps=num_warps)
            if handle is None and len(self._handles) < MAX_HANDLES and _are_aligned(addresses):
                self._keep(key, compiled)
            return
        run, function, metadata, stream_of = handle
        run(*grid, stream_of(device), function, metadata, None, None, None, *addresses, *constants)

    def _keep(self, key: tuple[object, ...], compiled: Any) -> None:
        if compiled is None:  # of an interpreted kernel
            return
        stream_of = _stream_lookup()
        if stream_of is not None:
            self._handles[key] = _Handle(compiled.run, compiled.function, compiled.packed_metadata, stream_of)


def _are_aligned(addresses: list[int]) -> bool:
    bits = 0
    for address in addresses:
        bits |= address
    return not bits % _POINTER_ALIGNMENT


@lru_cache(maxsize=1)
def _stream_lookup() -> Callable[[int], int] | None:
    """What tells a device's current stream, as Triton asks; None: it is of a version that is not known."""
    import triton
    from triton.runtime.driver import driver

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    first, last = _KNOWN_VERSIONS
    if not first <= version <= last:
        _log.warning("short prompts prefill more slowly: Triton %s launches its own way", triton.__version__)
        return None
    found: Callable[[int], int] = driver.active.get_current_stream
    return found
