"""Text from tokens as they come, without ever cutting a character.

A token may hold a part of a UTF-8 character, and some decoders look at more than one token, so tokens
can't be decoded one by one. This keeps a window of recent tokens, decodes it whole, and hands out what can
no longer change:

- a byte-level decoder replaces what is not UTF-8 by U+FFFD, and a character that has only begun shows as
  one U+FFFD at the very end: only that one is held back;
- a byte-fallback decoder (tokens ``<0xNN>``) judges a run of byte tokens as one: nothing is decided until
  the run ends.

A UTF-8 decoder is in step again after at most three wrong bytes, so the window can be cut to a few tokens
at any time; those left serve as context, for decoders that treat the first token of a text differently.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from kvrelay.client.token_bytes import TokenBytes

_UTF8_DECODER: Final = codecs.getincrementaldecoder("utf-8")
_REPLACEMENT: Final = "\ufffd"
_MAX_WINDOW_TOKENS: Final = 12
_CONTEXT_TOKENS: Final = 5


class Detokenizer(Protocol):
    """Decodes one output as it grows: the parts handed out, joined, are the text of all shown tokens."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; returns the text that they settle, perhaps empty."""
        ...

    def flush(self) -> str:
        """The rest, once no more tokens come."""
        ...


class ByteDetokenizer:
    """For byte-level vocabularies: tokens are bytes, and bytes are UTF-8; nothing is decoded twice.

    `hidden_ids` are not shown.
    """

    def __init__(self, token_bytes: TokenBytes, *, hidden_ids: frozenset[int] = frozenset()) -> None:
        self._token_bytes = token_bytes
        self._hidden_ids = hidden_ids
        self._decoder = _UTF8_DECODER(errors="replace")
        self._is_between_characters = True

    def push(self, token_ids: Sequence[int]) -> str:
        """As every detokenizer; most tokens are whole characters, which need no decoding."""
        hidden_ids = self._hidden_ids
        if self._is_between_characters and len(token_ids) == 1 and token_ids[0] not in hidden_ids:
            text = self._token_bytes.texts.get(token_ids[0])
            if text is not None:
                return text
        token_bytes = self._token_bytes
        raw = b"".join([token_bytes[token_id] for token_id in token_ids if token_id not in hidden_ids])
        text = self._decoder.decode(raw)
        self._is_between_characters = not self._decoder.getstate()[0]
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class WindowDetokenizer:
    """For any vocabulary: decodes a window of recent tokens again and again.

    `hidden_ids` are not shown: special tokens, which `decode` would leave out anyway, and what ends an
    output. `byte_ids` are the byte-fallback tokens, none for a byte-level vocabulary.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        hidden_ids: frozenset[int] = frozenset(),
        byte_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._decode = decode
        self._hidden_ids = hidden_ids
        self._byte_ids = byte_ids
        self._window: list[int] = []
        self._num_emitted_chars = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; returns the text that they settle, perhaps empty."""
        shown = [token_id for token_id in token_ids if token_id not in self._hidden_ids]
        if not shown:
            return ""
        self._window += shown
        if shown[-1] in self._byte_ids:
            return ""
        text = self._decode(self._window)
        num_settled_chars = len(text) - text.endswith(_REPLACEMENT)
        settled = text[self._num_emitted_chars : num_settled_chars]
        self._num_emitted_chars = max(self._num_emitted_chars, num_settled_chars)
        if len(self._window) > _MAX_WINDOW_TOKENS:
            self._shorten_window(len(text) - num_settled_chars)
        return settled

    def flush(self) -> str:
        """The rest, once no more tokens come."""
        rest = self._decode(self._window)[self._num_emitted_chars :]
        self._num_emitted_chars += len(rest)
        return rest

    def _shorten_window(self, num_held_chars: int) -> None:
        del self._window[:-_CONTEXT_TOKENS]
        self._num_emitted_chars = len(self._decode(self._window)) - num_held_chars
