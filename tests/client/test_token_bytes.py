"""Tokens are bytes: joined they are the text, in every script, and stream as `decode` shows them."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from kvrelay.client import ModelTokenizer
from kvrelay.client.detokenizer import ByteDetokenizer
from kvrelay.client.token_bytes import TokenBytes

SHARED = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200
)
TEXTS = [
    "Hello, world! It's 12345.67 € — naïve café",
    "Привет, мир! Καλημέρα",
    "你好，世界。日本語 한국어",
    "مرحبا بالعالم שלום",
    "हिन्दी ไทย ქართული አማርኛ",
    "🙂👩‍👩‍👧‍👦🇫🇷 ❤️ 𝔘𝔫𝔦",
    "  tabs\t\n\n\r\n   x  ",
    "\x00\x7f\u00ad\u00a0\ufffd",
]


def token_bytes_of(tokenizer: Tokenizer) -> TokenBytes:
    return TokenBytes(tokenizer, json.loads(tokenizer.to_str())["decoder"])


def joined(tokenizer: Tokenizer, text: str) -> bytes:
    token_bytes = token_bytes_of(tokenizer)
    return b"".join(
        token_bytes[token_id] for token_id in tokenizer.encode(text, add_special_tokens=False).ids
    )


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    from kvrelay.engine.embedded_model import ensure_smollm2

    return Tokenizer.from_file(str(ensure_smollm2() / "tokenizer.json"))


@pytest.fixture(scope="session")
def metaspace_tokenizer() -> Tokenizer:
    """As Llama 2's: blanks are U+2581, and what the vocabulary lacks becomes tokens <0xNN>."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for word in ("▁", "▁the", "the", "é", "日", "a", "b"):
        vocab[word] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken("<unk>", special=True)])
    tokenizer.add_tokens([AddedToken("<| a b |>", normalized=False), AddedToken("▁x▁", normalized=False)])
    return tokenizer


@pytest.fixture(scope="session")
def with_added_tokens(byte_level_tokenizer: Tokenizer) -> Tokenizer:
    """Byte-level, with added tokens of characters that no byte is written as, and of some that one is."""
    tokenizer = Tokenizer.from_str(byte_level_tokenizer.to_str())
    tokenizer.add_tokens([AddedToken("<| a b |>", normalized=False), AddedToken("日本", normalized=False)])
    return tokenizer


@pytest.fixture(scope="session")
def model_tokenizer(with_added_tokens: Tokenizer, make_bundle: Any) -> ModelTokenizer:
    return ModelTokenizer(make_bundle(with_added_tokens))


@pytest.mark.model
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_smollm2s_tokens_are_the_text(smollm2: Tokenizer, text: str) -> None:
    assert joined(smollm2, text) == text.encode()
    assert joined(smollm2, f"<|im_start|>{text}<|im_end|>") == f"<|im_start|>{text}<|im_end|>".encode()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("which", ["byte_level_tokenizer", "metaspace_tokenizer"])
def test_the_bytes_of_tokens_are_the_text(which: str, text: str, request: pytest.FixtureRequest) -> None:
    assert joined(request.getfixturevalue(which), text) == text.encode()


def test_added_tokens_stand_for_their_own_words(
    metaspace_tokenizer: Tokenizer, with_added_tokens: Tokenizer
) -> None:
    for tokenizer in (metaspace_tokenizer, with_added_tokens):
        assert joined(tokenizer, "a<| a b |>日本b") == "a<| a b |>日本b".encode()
    assert joined(metaspace_tokenizer, "a▁x▁b") == "a▁x▁b".encode(), "no blanks: it was not normalized"


@pytest.mark.parametrize("token_id", [-1, 300_000, 2**32, 2**40])
def test_an_id_that_the_vocabulary_lacks_has_no_bytes(byte_level_tokenizer: Tokenizer, token_id: int) -> None:
    assert token_bytes_of(byte_level_tokenizer)[token_id] == b""


@SHARED
@given(text=st.text(max_size=40))
def test_any_text_survives_as_bytes(
    byte_level_tokenizer: Tokenizer, metaspace_tokenizer: Tokenizer, text: str
) -> None:
    assert joined(byte_level_tokenizer, text) == text.encode()
    if "▁" not in text and "<0x" not in text:
        assert joined(metaspace_tokenizer, text) == text.encode()


@SHARED
@given(
    token_ids=st.lists(st.integers(0, 301) | st.sampled_from([0, 1, 300, 301]), max_size=120),
    cuts=st.lists(st.integers(0, 120), max_size=20),
    shows_special=st.booleans(),
)
def test_any_tokens_stream_as_decode_shows_them(
    with_added_tokens: Tokenizer,
    model_tokenizer: ModelTokenizer,
    token_ids: list[int],
    cuts: list[int],
    shows_special: bool,
) -> None:
    detokenizer = model_tokenizer.detokenizer(skip_special_tokens=not shows_special)
    assert isinstance(detokenizer, ByteDetokenizer)
    edges = [0, *sorted(min(cut, len(token_ids)) for cut in cuts), len(token_ids)]
    parts = [detokenizer.push(token_ids[start:end]) for start, end in itertools.pairwise(edges)]
    parts.append(detokenizer.flush())
    assert "".join(parts) == with_added_tokens.decode(token_ids, skip_special_tokens=not shows_special)


def test_what_ends_an_answer_is_hidden_though_special_tokens_are_shown(bundle: bytes) -> None:
    tokenizer = ModelTokenizer(bundle)
    start, end = tokenizer.encode("<|im_start|><|im_end|>")
    detokenizer = tokenizer.detokenizer(hidden_ids=[end], skip_special_tokens=False)
    assert detokenizer.push([start, end]) + detokenizer.flush() == "<|im_start|>"
