"""On which terms a request is served: how urgent it is, for whom, and until when its first token counts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

MAX_TENANT_CHARS: Final = 128


class Priority(StrEnum):
    """Classes of requests. A router gives each its share of the cluster, see docs/admission.md."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


@dataclass(frozen=True, slots=True)
class ServiceTerms:
    """`tenant` is who shares fairly with the others; empty: all who give none are one tenant.

    `ttft_timeout_s`, from arrival at the router: a first token that can't be out by then is not wanted, and
    the request is refused as soon as that is clear, but not broken off once a node works on it. None: any
    time within the request's whole time-out.
    """

    priority: Priority = Priority.NORMAL
    tenant: str = ""
    ttft_timeout_s: float | None = None


DEFAULT_TERMS: Final = ServiceTerms()
