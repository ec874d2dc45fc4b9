"""What goes on while one waits: a live line on a terminal, plain lines elsewhere. Goes to stderr."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.status import Status


class Progress:
    """Shows one text at a time. A context manager, so that the terminal is left as it was."""

    def __init__(self) -> None:
        self._status: Status | None = None
        self._last = ""
        self._is_over = False

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status("")
            self._status.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.finish()

    def finish(self) -> None:
        """Take the line away; what is updated after that is shown no more."""
        if self._status:
            self._status.stop()
        self._is_over = True

    def update(self, text: str) -> None:
        """Show `text`; the same again is not repeated."""
        if self._is_over or text == self._last:
            return
        self._last = text
        if self._status:
            from rich.text import Text

            self._status.update(Text(text))
        else:
            print(text, file=sys.stderr, flush=True)
