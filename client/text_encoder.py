"""Text to token ids, without tokenizing again what was tokenized before.

Where the tokenizer allows it (see `piecewise`), a text is cut at the special tokens in it, as a chat template
puts them around every message, and the ids of each part are kept: a conversation that has grown by a turn
costs the turn. Otherwise each text is tokenized whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tokenizers import Tokenizer

from kvrelay.client.piece_cache import PieceCache
from kvrelay.client.piecewise import cut_pattern, cuts_of, sample_texts

QUICK_CHARS: Final = 1024
"""Tokenizing so many takes 0.3 to 1 ms: SmolLM2's tokenizer does 3,600 characters of prose in a millisecond,
1,000 of random letters or of Japanese."""
_QUICK_KNOWN_CHARS: Final = 65_536
"""Cutting so many up and looking their parts up takes less than that."""
_QUICK_PARTS: Final = 512

_Around = tuple[list[int], list[int]]


class TextEncoder:
    """`description` is the tokenizer's tokenizer.json. Keeps at most about `max_cache_bytes`; 0: nothing. May
    be shared between threads."""

    def __init__(
        self, tokenizer: Tokenizer, description: Mapping[str, object], *, max_cache_bytes: int
    ) -> None:
        self._tokenizer = tokenizer
        self._cache = PieceCache(max_cache_bytes)
        self._cuts: Mapping[str, int] = cuts_of(tokenizer, description) if max_cache_bytes else {}
        self._around: dict[bool, _Around] = {}
        """What stands before and after a text's own ids, by `add_special_tokens`; none: don't cut it."""
        if self._cuts:
            self._pattern = cut_pattern(tuple(self._cuts))
            self._around = self._find_around()

    @property
    def is_piecewise(self) -> bool:
        """Whether parts of texts are kept."""
        return bool(self._around)

    def encode(self, text: str, *, add_special_tokens: bool, cache_salt: bytes = b"") -> tuple[int, ...]:
        """Token ids of a text, however long that takes; parts are found again under the same `cache_salt`."""
        if (around := self._around.get(add_special_tokens)) is None:
            return tuple(self._encode_texts([text], add_special_tokens)[0])
        ids = self._encode_parts(text, around, cache_salt, is_quick=False)
        assert ids is not None
        return ids

    def encode_if_quick(
        self, text: str, *, add_special_tokens: bool, cache_salt: bytes = b""
    ) -> tuple[int, ...] | None:
        """As `encode`, but None if that would take more than about a millisecond."""
        if len(text) > QUICK_CHARS:
            around = self._around.get(add_special_tokens)
            if around is None or len(text) > _QUICK_KNOWN_CHARS:
                return None
            return self._encode_parts(text, around, cache_salt, is_quick=True)
        return self.encode(text, add_special_tokens=add_special_tokens, cache_salt=cache_salt)

    def _encode_parts(
        self, text: str, around: _Around, salt: bytes, *, is_quick: bool
    ) -> tuple[int, ...] | None:
        parts = self._pattern.split(text)
        if is_quick and len(parts) > _QUICK_PARTS:
            return None
        texts, cuts = parts[::2], parts[1::2]
        found = self._cache.find(texts, salt=salt)
        if missing := list({part: None for part, ids in zip(texts, found, strict=True) if ids is None}):
            if is_quick and sum(map(len, missing)) > QUICK_CHARS:
                return None
            new = dict(zip(missing, self._encode_texts(missing), strict=True))
            for part, part_ids in new.items():
                self._cache.keep(part, part_ids, salt=salt)
            found = [new.get(part, ids) for part, ids in zip(texts, found, strict=True)]
        before, after = around
        token_ids = list(before)
        for cut, ids in zip([*cuts, ""], found, strict=True):
            token_ids += ids or ()
            if cut:
                token_ids.append(self._cuts[cut])
        token_ids += after
        return tuple(token_ids)

    def _encode_texts(self, texts: list[str], add_special_tokens: bool = False) -> list[list[int]]:
        # What is quick must not wait for the batches of others, which share a pool of threads.
        if sum(map(len, texts)) <= QUICK_CHARS:
            return [self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids for text in texts]
        batch = self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in batch]

    def _find_around(self) -> dict[bool, _Around]:
        """Believe in parts only as far as they give what the whole gives, on samples."""
        plain = self._tokenizer.encode("a 1", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a 1", add_special_tokens=True).ids
        start = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
        candidates: dict[bool, _Around] = {
            False: ([], []),
            True: (whole[:start], whole[start + len(plain) :]),
        }
        samples = sample_texts(tuple(self._cuts))
        return {
            add_special_tokens: around
            for add_special_tokens, around in candidates.items()
            if all(self._is_exact(text, around, add_special_tokens) for text in samples)
        }

    def _is_exact(self, text: str, around: _Around, add_special_tokens: bool) -> bool:
        whole = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return self._encode_parts(text, around, b"", is_quick=False) == tuple(whole)
