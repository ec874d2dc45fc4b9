"""What a service manager is told of this process, by systemd's notification protocol.

Source: sd_notify(3), systemd.service(5): datagrams of ``NAME=value`` lines to the socket named in
``NOTIFY_SOCKET``. Written here because it is a few lines, and the packages that hold them are not kept up.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Final

_MICROSECONDS: Final = 1_000_000
_SEND_TIMEOUT_S: Final = 0.5
"""A manager that is busy for a moment must not miss a word; one that hangs must not hold the service up."""
_MAX_STATUS_CHARS: Final = 200


class Notifier:
    """Tells the service manager at `address`; with an empty one there is nobody to tell, and every call does
    nothing. Never raises for want of a listener: a service does not stop because its manager went away.

    `watchdog_s` None: nobody waits for `pet`.
    """

    def __init__(self, address: str = "", watchdog_s: float | None = None) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self.watchdog_s = watchdog_s if address else None
        self._status = ""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Notifier:
        """The manager that started this process, if one did."""
        return cls(environ.get("NOTIFY_SOCKET", ""), _watchdog_s(environ))

    @property
    def is_heard(self) -> bool:
        """Whether there is a service manager to tell."""
        return bool(self._address)

    def ready(self, status: str) -> None:
        """Start-up is over: the service can do its work."""
        self._send("READY=1", self._status_line(status))

    def stopping(self, status: str, extend_s: float) -> None:
        """The service is on its way out, and may take `extend_s`."""
        self._send("STOPPING=1", self._status_line(status), _extension(extend_s))

    def extend(self, status: str, extend_s: float) -> None:
        """The phase under way (start or stop) goes on, and is heard of again within `extend_s`."""
        self._send(self._status_line(status), _extension(extend_s))

    def pet(self, status: str) -> None:
        """The service is alive; a watchdog that hears nothing for `watchdog_s` restarts it."""
        if self.watchdog_s is not None:
            self._send("WATCHDOG=1", self._status_line(status))
        elif status != self._status:
            self._send(self._status_line(status))

    def _status_line(self, status: str) -> str:
        self._status = status
        return f"STATUS={' '.join(status.split())[:_MAX_STATUS_CHARS]}"

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(_SEND_TIMEOUT_S)
                sender.sendto("\n".join(lines).encode(), self._address)
        except OSError:
            return


def _extension(extend_s: float) -> str:
    return f"EXTEND_TIMEOUT_USEC={round(extend_s * _MICROSECONDS)}"


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """Source: sd_watchdog_enabled(3)."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / _MICROSECONDS if microseconds.isdecimal() and int(microseconds) > 0 else None
