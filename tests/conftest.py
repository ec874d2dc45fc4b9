"""For all tests."""

from __future__ import annotations

import signal

# A test run started in the background may have inherited an ignored SIGINT, and every process that a test
# starts would inherit it in turn: Ctrl-C could not be tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
