"""For all tests."""

from __future__ import annotations

import os
import signal

# Test processes share the cores: with more threads than cores, those that wait spin, and all get slower.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A test run started in the background may have inherited an ignored SIGINT, and every process that a test
# starts would inherit it in turn: Ctrl-C could not be tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
