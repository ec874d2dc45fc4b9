"""Clients of scripted routers, and real tokenizers."""

from __future__ import annotations

import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from kvrelay.client import AsyncClient, ClientConfig
from kvrelay.core.cluster_view import ModelInfo
from kvrelay.core.tokenizer_chunk import tokenizer_digest

from .fake_router import FakeRouter, answer_token

CHAT_TEMPLATE = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "größer Straße",
    "日本語のテキスト",
    "naïve café",
] * 20


def make_model(
    bundle: bytes | None = None, name: str = "tiny", eos_token_ids: tuple[int, ...] = ()
) -> ModelInfo:
    return ModelInfo(name, 4096, 512, eos_token_ids, tokenizer_digest(bundle) if bundle else "", 1, 1)


@pytest.fixture
async def start_router() -> AsyncIterator[Callable[[], Awaitable[FakeRouter]]]:
    routers: list[FakeRouter] = []

    async def start() -> FakeRouter:
        router = FakeRouter()
        await router.start()
        router.models = (make_model(),)
        routers.append(router)
        return router

    yield start
    for router in routers:
        await router.kill()


@pytest.fixture
async def router(start_router: Callable[[], Awaitable[FakeRouter]]) -> FakeRouter:
    return await start_router()


@pytest.fixture
def config(tmp_path: Path) -> ClientConfig:
    """Impatient, with a cache of its own."""
    return ClientConfig(
        cache_dir=tmp_path / "tokenizers",
        backoff_base_s=0.001,
        backoff_max_s=0.01,
        connect_timeout_s=10.0,
        call_timeout_s=20.0,
    )


@pytest.fixture
async def client(router: FakeRouter, config: ClientConfig) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(router.address, config=config) as made:
        yield made


@pytest.fixture
def answer() -> Callable[[Sequence[int], int], tuple[int, ...]]:
    """``answer(prompt, n)``: the first n tokens that every fake router gives to that prompt."""
    return lambda prompt, num_tokens: tuple(answer_token(prompt, index) for index in range(num_tokens))


@pytest.fixture(name="make_model")
def make_model_fixture() -> Callable[..., ModelInfo]:
    return make_model


@pytest.fixture(scope="session", name="make_bundle")
def make_bundle_fixture() -> Callable[..., bytes]:
    return make_bundle


@pytest.fixture(scope="session")
def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE of a few merges: most of what is not ASCII takes several tokens a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def byte_fallback_tokenizer() -> Tokenizer:
    """As SentencePiece makes them: what is not in the vocabulary becomes a run of tokens <0xNN>."""
    words = ["▁the", "▁fox", "▁", "a", "b", "é", "▁日", "本"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for word in words:
        vocab[word] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def make_bundle(tokenizer: Tokenizer, chat_template: str = CHAT_TEMPLATE) -> bytes:
    content = {
        "tokenizer": json.loads(tokenizer.to_str()),
        "chat_template": chat_template,
        "special_tokens": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    }
    return zlib.compress(json.dumps(content).encode())


@pytest.fixture(scope="session")
def bundle(byte_level_tokenizer: Tokenizer) -> bytes:
    return make_bundle(byte_level_tokenizer)


@pytest.fixture
def text_router(router: FakeRouter, bundle: bytes, byte_level_tokenizer: Tokenizer) -> FakeRouter:
    """The router, with a model that has a tokenizer."""
    end = byte_level_tokenizer.token_to_id("<|im_end|>")
    router.models = (make_model(bundle, eos_token_ids=(end,)),)
    router.bundles = {"tiny": bundle}
    return router
