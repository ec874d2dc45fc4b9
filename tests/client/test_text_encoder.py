"""Tokenizing by parts gives what tokenizing the whole gives, or is not done."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from kvrelay.client.piecewise import cut_pattern
from kvrelay.client.text_encoder import QUICK_CHARS, TextEncoder

SMOLLM2 = Path.home() / ".cache/kvrelay/SmolLM2-135M-Instruct-v1/tokenizer.json"
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "<|im_end|>|>", "<fim>"]
WORDS = [
    "the fox's den",
    "größer  Straße",
    "日本語\n\n",
    "e\u0301a 12345",
    "naïve\tcafé",
    " x",
    "\u2581y",
] * 9
LLAMA_SPLIT = (
    r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def make_tokenizer(pre_tokenizer: Any = None, normalizer: Any = None, bos: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer or byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=[*pre_tokenizers.ByteLevel.alphabet(), "日", "本", "ß", " ", "\n"],
        special_tokens=["<unk>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A <fim>", special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<s>", "<fim>")]
        )
    return tokenizer


def with_added(**flags: Any) -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<odd>", **{"special": True, "normalized": False, **flags})])
    return tokenizer


def with_words_added() -> Tokenizer:
    tokenizer = make_tokenizer(normalizer=normalizers.Lowercase())
    tokenizer.add_tokens([AddedToken("Fox", normalized=True, single_word=True, lstrip=True)])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<|im", normalized=False)])
    return tokenizer


LLAMA_3 = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(LLAMA_SPLIT), "isolated"), byte_level(use_regex=False)]
)
BY_PARTS = {
    "smollm2-like": make_tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()])),
    "llama-3-like": make_tokenizer(LLAMA_3, bos=True),
    "nfc": make_tokenizer(normalizer=normalizers.NFC()),
    "gemma-like": make_tokenizer(
        pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁")
    ),
    "words added": with_words_added(),
}
WHOLE = {
    "metaspace first": make_tokenizer(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "metaspace always": make_tokenizer(pre_tokenizers.Metaspace(prepend_scheme="always"), bos=True),
    "prefix space": make_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "prepend": make_tokenizer(normalizer=normalizers.Prepend("▁")),
    "strips right": with_added(rstrip=True),
    "strips left": with_added(lstrip=True),
    "single word": with_added(single_word=True),
    "not BPE": Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")),
    "no special tokens": Tokenizer(models.BPE()),
}
ANY = BY_PARTS | WHOLE
PARTS = st.one_of(
    st.sampled_from([*SPECIAL, "<odd>", "<|im_", "|>", "<", "Fox", "<think>"]),
    st.sampled_from(
        [" ", "  ", "\n", "\t", "\u00a0", "\u3000", "\r\n", "'s", "123", "e\u0301", "\u0301", "日本"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)
TEXTS = st.lists(PARTS, max_size=12).map("".join)


def make_encoder(tokenizer: Tokenizer, max_cache_bytes: int = 1 << 20) -> TextEncoder:
    return TextEncoder(tokenizer, json.loads(tokenizer.to_str()), max_cache_bytes=max_cache_bytes)


def check_equal(
    encoder: TextEncoder, tokenizer: Tokenizer, texts: list[str], add_special_tokens: bool
) -> None:
    for text in [*texts, "".join(texts), *texts]:
        whole = tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        assert encoder.encode(text, add_special_tokens=add_special_tokens) == whole, text
        if (quick := encoder.encode_if_quick(text, add_special_tokens=add_special_tokens)) is not None:
            assert quick == whole, text


@pytest.mark.parametrize("name", ANY)
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4), add_special_tokens=st.booleans())
def test_ids_are_those_of_the_whole_text(name: str, texts: list[str], add_special_tokens: bool) -> None:
    check_equal(make_encoder(ANY[name]), ANY[name], texts, add_special_tokens)


@pytest.fixture(scope="module")
def smollm2() -> tuple[Tokenizer, TextEncoder]:
    if not SMOLLM2.exists():
        pytest.skip("the embedded model is not unpacked here")
    tokenizer = Tokenizer.from_file(str(SMOLLM2))
    return tokenizer, make_encoder(tokenizer)


@pytest.mark.model
@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4), add_special_tokens=st.booleans())
def test_ids_of_the_embedded_model_are_those_of_the_whole_text(
    smollm2: tuple[Tokenizer, TextEncoder], texts: list[str], add_special_tokens: bool
) -> None:
    tokenizer, encoder = smollm2
    assert encoder.is_piecewise
    check_equal(encoder, tokenizer, texts, add_special_tokens)


@pytest.mark.parametrize("name", ANY)
def test_texts_are_cut_only_where_the_tokenizer_is_known_to_work_part_by_part(name: str) -> None:
    assert make_encoder(ANY[name]).is_piecewise == (name in BY_PARTS)
    assert not make_encoder(ANY[name], max_cache_bytes=0).is_piecewise


def test_a_tokenizer_that_fails_the_samples_is_not_used_by_parts() -> None:
    """Its description says less than it does: the samples find out."""
    tokenizer = WHOLE["metaspace first"]
    description = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    encoder = TextEncoder(tokenizer, description, max_cache_bytes=1 << 20)
    assert not encoder.is_piecewise
    check_equal(encoder, tokenizer, ["the fox<|im_end|>the fox"], False)


def test_a_conversation_that_grew_is_quick_where_its_beginning_is_known() -> None:
    tokenizer = BY_PARTS["llama-3-like"]
    encoder = make_encoder(tokenizer)
    turns = "".join(f"<|im_start|>user\n{number} {'the fox ' * 200}<|im_end|>" for number in range(9))
    assert encoder.encode_if_quick(turns, add_special_tokens=False) is None
    encoder.encode(turns, add_special_tokens=False)
    grown = turns + "<|im_start|>user\nand now?<|im_end|>"
    expected = tuple(tokenizer.encode(grown, add_special_tokens=False).ids)
    assert encoder.encode_if_quick(grown, add_special_tokens=False) == expected
    assert encoder.encode_if_quick(grown, add_special_tokens=False, cache_salt=b"other") is None
    assert encoder.encode_if_quick(grown + "x" * (QUICK_CHARS + 1), add_special_tokens=False) is None


def test_parts_are_found_again_also_where_a_bos_is_added() -> None:
    tokenizer = BY_PARTS["llama-3-like"]
    encoder = make_encoder(tokenizer)
    text = f"{'the fox ' * 200}<|im_end|>and"
    expected = tuple(tokenizer.encode(text).ids)
    assert encoder.encode(text, add_special_tokens=True) == expected
    assert encoder.encode_if_quick(text, add_special_tokens=True) == expected
    assert expected[0] == tokenizer.token_to_id("<s>")


def test_many_small_parts_are_not_quick() -> None:
    encoder = make_encoder(BY_PARTS["nfc"])
    text = "<s>" * 2000
    assert len(encoder.encode(text, add_special_tokens=False)) == 2000
    assert encoder.encode_if_quick(text, add_special_tokens=False) is None


@given(
    tokens=st.lists(st.text("ab<|", min_size=1, max_size=6), min_size=1, max_size=8),
    text=st.text("ab<|", max_size=30),
)
def test_cuts_are_leftmost_and_longest(tokens: list[str], text: str) -> None:
    plain = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    assert cut_pattern(tokens).split(text) == re.split(f"({plain})", text)
