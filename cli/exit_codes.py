"""What the exit status of `kvrelay` says, and how an error looks on the terminal."""

from __future__ import annotations

from typing import Final

from kvrelay.core.errors import (
    CallerError,
    ConfigError,
    KVRelayError,
    NodeUnavailable,
    Overloaded,
    RequestCancelled,
    RouterUnavailable,
    UnknownModel,
)

EXIT_FAILURE: Final = 1
"""Anything that is neither of the others."""
EXIT_USAGE: Final = 2
"""The caller's fault: a bad flag, a bad request, a bad config file."""
EXIT_UNAVAILABLE: Final = 3
"""No router, no node, or no room: the same command may succeed later."""
EXIT_INTERRUPTED: Final = 130
"""Ctrl-C."""

_HINTS: Final[dict[type[KVRelayError], str]] = {
    RouterUnavailable: "is the router running? `kvrelay up` starts one here, --router names another",
    NodeUnavailable: "`kvrelay status` shows which nodes are attached",
    UnknownModel: "`kvrelay status` shows which models are served",
}


def exit_code_of(error: KVRelayError) -> int:
    """The exit status that `error` ends the process with."""
    if isinstance(error, RequestCancelled):
        return EXIT_FAILURE
    if isinstance(error, CallerError):
        return EXIT_USAGE
    if isinstance(error, NodeUnavailable | RouterUnavailable | Overloaded):
        return EXIT_UNAVAILABLE
    return EXIT_FAILURE


def describe_error(error: KVRelayError) -> str:
    """``kvrelay: MESSAGE (HINT)``; a config's faults one a line."""
    if isinstance(error, ConfigError):
        return "\n".join(f"kvrelay: {line}" for line in error.message.splitlines())
    message = error.message.strip()
    if error.field and error.field.rpartition(".")[2] not in message:
        message = f"{error.field}: {message}"
    hint = _HINTS.get(type(error), "")
    if error.retry_after_s is not None:
        hint = f"try again in {error.retry_after_s:g} s"
    return f"kvrelay: {message}" + (f" ({hint})" if hint else "")
