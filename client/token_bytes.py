"""The bytes that each token of a vocabulary stands for.

Source: `bytes_to_unicode` of GPT-2's tokenizer for byte-level vocabularies; SentencePiece for the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

from tokenizers import Tokenizer

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE: Final = "\u2581"


def _byte_of_char() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    chars = {chr(byte): byte for byte in printable}
    return chars | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTE_OF_CHAR: Final[Mapping[str, int]] = _byte_of_char()


class TokenBytes:
    """Looks tokens up by id. `is_byte_level`: the decoder is ByteLevel and nothing else, so the bytes of
    tokens in a row, joined, are the bytes of their text."""

    def __init__(self, tokenizer: Tokenizer, decoder: object) -> None:
        self.is_byte_level = isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"
        self._token_of: Callable[[int], str | None] = tokenizer.id_to_token
        self._added = {
            token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        self._known: dict[int, bytes] = {}
        self.texts: dict[int, str] = {}
        """Of those looked up so far that are whole UTF-8."""

    def __getitem__(self, token_id: int) -> bytes:
        """Empty for an id that the vocabulary does not have."""
        found = self._known.get(token_id)
        if found is None:
            token = self._token_of(token_id) if 0 <= token_id < 2**32 else None
            if token is None:
                return b""
            found = self._known[token_id] = self._bytes_of(token_id, token)
            with suppress(UnicodeDecodeError):
                self.texts[token_id] = found.decode()
        return found

    def _bytes_of(self, token_id: int, token: str) -> bytes:
        if self.is_byte_level:
            try:
                return bytes([_BYTE_OF_CHAR[char] for char in token])
            except KeyError:  # An added token with a character of its own, such as a blank.
                return token.encode()
        if token_id in self._added:
            return token.encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace(_SPACE, " ").encode()
