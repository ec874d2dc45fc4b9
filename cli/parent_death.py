"""A service that `kvrelay up` started never outlives it, however `up` ends."""

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
    if not named.isdigit():
        return
    parent_pid = int(named)
    if sys.platform == "linux":
        _ask_kernel()
    else:
        threading.Thread(target=_watch, args=(parent_pid,), name="parent-watch", daemon=True).start()
    if os.getppid() != parent_pid:  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def _ask_kernel() -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def _watch(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)
