"""Token logprobs in the two shapes that OpenAI gives them: chat's and the older one of completions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from kvrelay.client import ModelTokenizer, TokenLogprobs


def num_logprobs_of(wanted: bool, num_top: int | None) -> int | None:
    """kvrelay's parameter for chat's two: None: none; 0: the chosen token's alone."""
    return (num_top or 0) if wanted else None


def chat_logprobs(
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    tokenizer: ModelTokenizer,
    hidden_ids: Collection[int],
) -> list[dict[str, Any]]:
    """One entry per token that is shown."""
    entries = []
    for token_id, entry in zip(token_ids, logprobs, strict=True):
        if entry is None or token_id in hidden_ids:
            continue
        top = [_token(tokenizer, top_id, logprob) for top_id, logprob in entry.top]
        entries.append({**_token(tokenizer, token_id, entry.chosen), "top_logprobs": top})
    return entries


def _token(tokenizer: ModelTokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}


class CompletionLogprobs:
    """Columns of the older shape; `text_offset` goes on from part to part of one answer."""

    def __init__(self, tokenizer: ModelTokenizer, hidden_ids: Collection[int], num_top: int) -> None:
        self._tokenizer = tokenizer
        self._hidden_ids = hidden_ids
        self._num_top = num_top
        self._num_chars = 0

    def columns(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]
    ) -> dict[str, list[Any]]:
        """The next tokens' columns."""
        found: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token_id, entry in zip(token_ids, logprobs, strict=True):
            if entry is None or token_id in self._hidden_ids:
                continue
            text = self._text(token_id)
            found["tokens"].append(text)
            found["token_logprobs"].append(entry.chosen)
            found["top_logprobs"].append(
                {self._text(top_id): logprob for top_id, logprob in entry.top} if self._num_top else None
            )
            found["text_offset"].append(self._num_chars)
            self._num_chars += len(text)
        return found

    def _text(self, token_id: int) -> str:
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:  # A part of a character, written as OpenAI does.
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
