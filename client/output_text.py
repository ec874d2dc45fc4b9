"""An output's text as its tokens come: decoded, and ended where it meets a stop string. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from kvrelay.client.detokenizer import Detokenizer
from kvrelay.client.stop_strings import StopStrings


class OutputText:
    """`detokenizer` None: no text is wanted. `stops` None: nothing ends it but the cluster."""

    def __init__(self, detokenizer: Detokenizer | None, stops: StopStrings | None = None) -> None:
        assert stops is None or detokenizer is not None, "stop strings are found in text"
        self._detokenizer = detokenizer
        self._stops = stops
        self._num_tokens = 0
        self._parts: list[str] = []

    @property
    def stop_text(self) -> str | None:
        """The stop string that it met."""
        return self._stops.matched if self._stops is not None else None

    @property
    def whole(self) -> str:
        """All that was given out."""
        return "".join(self._parts)

    def push(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Take tokens; the text that they settle, and how many of them the output has: all, unless it ends
        with one of them."""
        if self._detokenizer is None:
            return "", len(token_ids)
        if self._stops is None:
            text = self._detokenizer.push(token_ids)
            if text:
                self._parts.append(text)
            return text, len(token_ids)
        text = ""
        for number, token_id in enumerate(token_ids, 1):
            self._num_tokens += 1
            text += self._stops.push(self._detokenizer.push((token_id,)), self._num_tokens)
            if self._stops.matched is not None:
                return self._given(text), number
        return self._given(text), len(token_ids)

    def flush(self) -> str:
        """The rest, once no more tokens come; it may meet a stop string still."""
        if self._detokenizer is None or self.stop_text is not None:
            return ""
        rest = self._detokenizer.flush()
        if self._stops is not None:
            rest = self._stops.push(rest, self._num_tokens)
            rest += "" if self._stops.matched is not None else self._stops.flush()
        return self._given(rest)

    def _given(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text
