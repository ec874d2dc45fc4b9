"""Errors that a peer reports: only those that a transfer can end with, whatever code the peer sends."""

from __future__ import annotations

from typing import Final

from kvrelay.core.errors import (
    KVLayoutMismatch,
    KVRelayError,
    Overloaded,
    TransferCancelled,
    TransferCorrupt,
    TransferFailed,
    TransferTimeout,
    error_from_code,
)

_ALLOWED_CODES: Final = frozenset(
    error.code
    for error in (
        TransferFailed,
        TransferTimeout,
        TransferCancelled,
        TransferCorrupt,
        KVLayoutMismatch,
        Overloaded,
    )
)


def peer_error(code: str, message: str) -> KVRelayError:
    """The error to report; codes that make no sense for a transfer become `TransferFailed`."""
    if code not in _ALLOWED_CODES:
        code = TransferFailed.code
    return error_from_code(code, f"the peer gave up: {message}")
