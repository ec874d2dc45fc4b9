"""How long a step would have taken."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from kvrelay.core.errors import ConfigError
from kvrelay.engine.sequence import Chunk


@dataclass(frozen=True, slots=True)
class SimTiming:
    """A linear model of step time, calibrated from measurements of a real engine. All in seconds.

    A step costs the largest of its bases, plus its parts: a prefill token costs `prefill_token_s`, and
    `prefill_token_context_s` more for each token before it; a decode costs `decode_seq_s`, and
    `decode_context_token_s` for each token of its context. The defaults resemble an 8B model on one H100.

    Raises:
        ConfigError: a term is negative or not a number.
    """

    prefill_base_s: float = 0.005
    prefill_token_s: float = 2.4e-5
    prefill_token_context_s: float = 1.1e-9
    decode_base_s: float = 0.0065
    decode_seq_s: float = 2.0e-5
    decode_context_token_s: float = 4.0e-8

    def __post_init__(self) -> None:
        faults = [item.name for item in fields(self) if not 0.0 <= getattr(self, item.name) < 3600.0]
        if faults:
            raise ConfigError(f"sim timing must be from 0 to 3600 s: {', '.join(faults)}")

    def step_s(self, chunks: Iterable[Chunk]) -> float:
        """Seconds for one step that computes `chunks`."""
        base_s = parts_s = 0.0
        for chunk in chunks:
            if chunk.is_prefill:
                base_s = max(base_s, self.prefill_base_s)
                context = chunk.start + chunk.num_tokens / 2
                parts_s += chunk.num_tokens * (self.prefill_token_s + self.prefill_token_context_s * context)
            else:
                base_s = max(base_s, self.decode_base_s)
                parts_s += self.decode_seq_s + self.decode_context_token_s * chunk.start
        return base_s + parts_s


INSTANT = SimTiming(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""Every step takes no time: for tests of logic."""
