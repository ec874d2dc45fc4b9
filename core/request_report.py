"""How a request was served, as the client is told at its end."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestReport:
    """The last attempt's placement and the whole request's timings, in seconds on the router's clock."""

    prefill_node: str
    decode_node: str
    num_attempts: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    queue_s: float
    ttft_s: float
    total_s: float
    kv_bytes: int
    kv_messages: int
    kv_seconds: float
    kv_transport: str
    num_pulled_tokens: int = 0
    """Of the cached tokens, those that came from another node for this request."""
