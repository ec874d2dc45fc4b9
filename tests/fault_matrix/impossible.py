"""Cells that cannot occur, and why."""

from __future__ import annotations

from typing import Final

_SENDER_FAULTS: Final = (
    "none",
    "kill_prefill",
    "stop_prefill",
    "cut_prefill_stream",
    "silence_prefill_stream",
    "drain_prefill",
)
_OVER: Final = ("finished", "cancelled")
_PROXY: Final = ("kill_proxy", "drain_proxy")
_CLIENT: Final = ("cut_client", "client_leaves")


def why_impossible(state: str, fault: str) -> str:
    """The reason; empty: it can occur."""
    if state == "sending_prefix" and fault not in _SENDER_FAULTS:
        return "the same as in the row above: only the prefill node is another one"
    if fault in _PROXY and state != "proxied":
        return "the client asks the routers itself"
    if state in _OVER and fault in _CLIENT:
        return "the client has heard the end already, and waits for nothing"
    return ""
