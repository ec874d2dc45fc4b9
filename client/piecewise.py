"""Where a text can be cut so that its parts, tokenized one by one, give the tokens of the whole.

A tokenizer first finds the added tokens that are not `normalized`, leftmost and longest, and then treats what
lies between them part by part. The parts do not see each other as long as no component looks at where in the
text it is, which Metaspace does, and no added token looks at what stands beside it.
Source: `AddedVocabulary` and `PreTokenizedString` of Hugging Face tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Final

from tokenizers import AddedToken, Tokenizer

_NORMALIZERS: Final = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Replace"}
_PRE_TOKENIZERS: Final = {"ByteLevel", "Split", "Digits"}
_SAMPLES: Final = (
    "",
    " ",
    "\n",
    "a",
    " a",
    "a ",
    "The  quick\n\nbrown 'fox's",
    "12345",
    "e\u0301",
    "日本",
    "🦊",
)


def cuts_of(tokenizer: Tokenizer, description: Mapping[str, object]) -> Mapping[str, int]:
    """The added tokens to cut at, with their ids; empty: this tokenizer is not known to work part by part.

    `description` is its tokenizer.json.
    """
    model = description.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE" or model.get("dropout"):
        return {}
    normalizers = _components(description.get("normalizer"), "normalizers")
    pre_tokenizers = _components(description.get("pre_tokenizer"), "pretokenizers")
    if any(part.get("type") not in _NORMALIZERS for part in normalizers):
        return {}
    if any(
        part.get("type") not in _PRE_TOKENIZERS or part.get("add_prefix_space") for part in pre_tokenizers
    ):
        return {}
    # Those that are normalized are found within a part.
    tokens = {
        token_id: token
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if not token.normalized
    }
    if not all(map(_is_plain, tokens.values())):
        return {}
    return {token.content: token_id for token_id, token in tokens.items()}


def cut_pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    """Finds the leftmost and longest of `tokens` (at least one, none empty), as its only group. Takes time in
    proportion to the text, also where tokens share long beginnings."""
    return re.compile(f"({_any_of(tokens)})")


def sample_texts(cuts: Sequence[str]) -> list[str]:
    """Texts with `cuts` (not empty) in them, to see whether their parts give the tokens of the whole."""
    used = [*cuts[:4], *cuts[-4:]]
    mixed = "".join(
        f"{text}{used[number % len(used)]}{_SAMPLES[-number]}" for number, text in enumerate(_SAMPLES)
    )
    return [*cuts, *(f"{text}{used[0]}{text}{used[-1]}{text}" for text in _SAMPLES), mixed]


def _components(part: object, name_of_parts: str) -> list[Mapping[str, object]]:
    """A component, or those of a sequence of them; what can't be read has no type."""
    if part is None:
        return []
    if not isinstance(part, Mapping):
        return [{}]
    if part.get("type") != "Sequence":
        return [part]
    parts = part.get(name_of_parts)
    if not isinstance(parts, list):
        return [{}]
    return [component for each in parts for component in _components(each, name_of_parts)]


def _is_plain(token: AddedToken) -> bool:
    return bool(token.content) and not (token.lstrip or token.rstrip or token.single_word)


def _any_of(texts: Sequence[str]) -> str:
    parts = []
    for _, group in groupby(sorted(set(texts)), key=lambda text: text[0]):
        alike = list(group)
        start = _common_start(alike[0], alike[-1])  # sorted, so also that of what lies between
        ends = [text[len(start) :] for text in alike]
        more = [end for end in ends if end]
        end_pattern = _any_of(more) + ("?" if len(more) < len(ends) else "") if more else ""
        parts.append(re.escape(start) + end_pattern)
    return f"(?:{'|'.join(parts)})"


def _common_start(first: str, second: str) -> str:
    num_chars = next(
        (at for at, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )
    return first[:num_chars]
