"""A process that another one started never outlives it, however that ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import MutableMapping
from typing import Final

PARENT_VARIABLE: Final = "KVRELAY_PARENT_PID"
"""Set by `kvrelay up` for its children."""

_PR_SET_PDEATHSIG: Final = 1
_POLL_S: Final = 1.0


def die_with_parent(environ: MutableMapping[str, str] = os.environ) -> None:
    """Kill this process as soon as the one named in `PARENT_VARIABLE` is gone; without it, do nothing.

    SIGKILL, since nobody is left to serve: the parent asks politely as long as it lives.
    """
    named = environ.pop(PARENT_VARIABLE, "")
    if named.isdigit():
        die_with(int(named), signal.SIGKILL)


def die_with(parent_pid: int, number: signal.Signals) -> None:
    """Send this process a signal as soon as its parent is gone."""
    if sys.platform == "linux":
        _ask_kernel(number)
    else:
        arguments = (parent_pid, number)
        threading.Thread(target=_watch, args=arguments, name="parent-watch", daemon=True).start()
    if os.getppid() != parent_pid:  # it died before the kernel was asked
        os.kill(os.getpid(), number)


def _ask_kernel(number: signal.Signals) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def _watch(parent_pid: int, number: signal.Signals) -> None:
    while os.getppid() == parent_pid:
        time.sleep(_POLL_S)
    os.kill(os.getpid(), number)
