"""Text in, text out: tokenizers, chat templates, and the cache they are kept in."""

from __future__ import annotations

import asyncio
import hashlib
import os
import zlib
from pathlib import Path
from typing import Any

import pytest

from kvrelay.client import AsyncClient, ClientConfig, FinishReason, ModelTokenizer, SamplingParams
from kvrelay.client.chat_template import ChatTemplate
from kvrelay.client.tokenizer_cache import MAX_FILES, TokenizerCache
from kvrelay.core.errors import InvalidRequest, KVRelayError, NodeUnavailable

FOX = "a 🦊 größer\n日本"


def answers(token_ids: list[int], num_per_message: int = 1) -> Any:
    async def script(call: Any) -> None:
        for start in range(0, len(token_ids), num_per_message):
            await call.tokens(*token_ids[start : start + num_per_message])
        await call.finish(FinishReason.STOP)

    return script


async def test_a_text_prompt_is_tokenized_as_it_is(
    client: AsyncClient, text_router: Any, byte_level_tokenizer: Any
) -> None:
    await client.complete("the fox", sampling=SamplingParams(max_tokens=2))
    call = text_router.calls[0].call
    assert list(call.request.token_ids) == byte_level_tokenizer.encode("the fox").ids
    assert call.model == "tiny"


@pytest.mark.parametrize("num_per_message", [1, 2, 3, 100])
async def test_streamed_text_never_cuts_a_character_and_adds_up(
    client: AsyncClient, text_router: Any, byte_level_tokenizer: Any, num_per_message: int
) -> None:
    end = byte_level_tokenizer.token_to_id("<|im_end|>")
    text_router.script = answers([*byte_level_tokenizer.encode(FOX).ids, end], num_per_message)
    stream = client.generate("x")
    texts = [chunk.text async for chunk in stream]
    assert "".join(texts) == FOX == stream.result.text
    assert not any("\ufffd" in text for text in texts)
    assert stream.result.token_ids[-1] == end


async def test_what_stays_incomplete_comes_in_a_last_chunk_without_tokens(
    client: AsyncClient, text_router: Any, byte_level_tokenizer: Any
) -> None:
    token_ids = byte_level_tokenizer.encode("a🦊").ids[:-1]
    finish = asyncio.Event()

    async def script(call: Any) -> None:
        await call.tokens(*token_ids)
        await finish.wait()
        await call.finish()

    text_router.script = script
    stream = client.generate([1])
    first = await anext(stream)
    assert (first.text, list(first.token_ids)) == ("a", token_ids)
    finish.set()
    last = await anext(stream)
    assert (last.text, last.token_ids, last.index) == ("\ufffd", (), len(token_ids))
    assert stream.result.text == byte_level_tokenizer.decode(token_ids)


async def test_text_goes_on_over_a_continuation(
    client: AsyncClient, text_router: Any, byte_level_tokenizer: Any
) -> None:
    token_ids = byte_level_tokenizer.encode(FOX).ids

    async def breaks_in_the_fox(call: Any) -> None:
        done = call.call.request.num_output_tokens
        if done == 0:
            await call.tokens(*token_ids[:3])
            await call.fail(NodeUnavailable("lost"))
        else:
            await call.tokens(*token_ids[done:])
            await call.finish()

    text_router.script = breaks_in_the_fox
    result = await client.complete("x")
    assert (result.text, result.num_continuations) == (FOX, 1)


async def test_stop_tokens_are_not_shown(
    client: AsyncClient, text_router: Any, byte_level_tokenizer: Any
) -> None:
    *word, stop = byte_level_tokenizer.encode("fox!").ids
    text_router.script = answers([*word, stop])
    result = await client.complete("x", sampling=SamplingParams(stop_token_ids=(stop,)))
    assert (result.text, result.token_ids) == ("fox", (*word, stop))


async def test_text_can_be_done_without(client: AsyncClient, text_router: Any) -> None:
    result = await client.complete([1, 2], sampling=SamplingParams(max_tokens=3), decode_text=False)
    assert result.text == ""
    assert (text_router.num_model_requests, text_router.num_tokenizer_requests) == (0, 0)


async def test_messages_go_through_the_chat_template(
    client: AsyncClient, text_router: Any, byte_level_tokenizer: Any
) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    await client.complete(messages=messages, sampling=SamplingParams(max_tokens=1))
    await client.complete("hi", chat=True, sampling=SamplingParams(max_tokens=1))
    prompts = [
        byte_level_tokenizer.decode(list(call.call.request.token_ids), skip_special_tokens=False)
        for call in text_router.calls
    ]
    assert prompts == [
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    ]
    special = byte_level_tokenizer.token_to_id("<|im_start|>")
    assert text_router.calls[0].call.request.token_ids[0] == special


async def test_text_needs_a_tokenizer_and_says_so(client: AsyncClient) -> None:
    for arguments, field in (
        ({"prompt": "hi"}, "prompt"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages"),
    ):
        with pytest.raises(InvalidRequest, match="no tokenizer") as caught:
            await client.complete(**arguments)
        assert caught.value.field == field
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        await client.tokenize("hi")


async def test_messages_need_a_chat_template_and_say_so(
    client: AsyncClient, router: Any, byte_level_tokenizer: Any, make_bundle: Any, make_model: Any
) -> None:
    bundle = make_bundle(byte_level_tokenizer, chat_template="")
    router.models, router.bundles = (make_model(bundle),), {"tiny": bundle}
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        await client.complete("hi", chat=True)
    assert caught.value.field == "messages"


async def test_tokenize_and_detokenize_agree(client: AsyncClient, text_router: Any) -> None:
    token_ids = await client.tokenize(FOX)
    assert await client.detokenize(token_ids) == FOX
    assert await client.detokenize([*token_ids, 0], skip_special_tokens=False) == FOX + "<|im_start|>"
    with pytest.raises(InvalidRequest) as caught:
        await client.detokenize([-1])
    assert caught.value.field == "token_ids"
    with pytest.raises(InvalidRequest) as caught:
        await client.tokenize(b"bytes")  # type: ignore[arg-type]
    assert caught.value.field == "text"


async def test_the_tokenizer_is_fetched_once_and_then_from_disk(
    text_router: Any, config: ClientConfig
) -> None:
    async with AsyncClient(text_router.address, config=config) as client:
        await asyncio.gather(*(client.tokenize("x") for _ in range(10)))
    async with AsyncClient(text_router.address, config=config) as client:
        await client.tokenize("x")
    assert text_router.num_tokenizer_requests == 1


async def test_a_tokenizer_that_is_not_what_was_announced_is_refused(
    text_router: Any, config: ClientConfig
) -> None:
    text_router.bundles = {"tiny": b"something else"}
    impatient = ClientConfig(max_retries=1, backoff_base_s=0.001, cache_dir=config.cache_dir)
    async with AsyncClient(text_router.address, config=impatient) as client:
        with pytest.raises(KVRelayError, match="digest"):
            await client.complete("x")
    assert config.cache_dir is not None
    assert not config.cache_dir.exists()


class TestTokenizerCache:
    DATA = b"a bundle"
    DIGEST = hashlib.sha256(DATA).hexdigest()

    def test_what_was_written_is_read(self, tmp_path: Path) -> None:
        cache = TokenizerCache(tmp_path / "new" / "folder")
        assert cache.read(self.DIGEST) is None
        cache.write(self.DIGEST, self.DATA)
        assert cache.read(self.DIGEST) == self.DATA
        assert len(list((tmp_path / "new" / "folder").iterdir())) == 1

    def test_a_damaged_file_is_not_believed_and_goes(self, tmp_path: Path) -> None:
        cache = TokenizerCache(tmp_path)
        cache.write(self.DIGEST, self.DATA)
        (file,) = tmp_path.iterdir()
        file.write_bytes(b"damaged")
        assert cache.read(self.DIGEST) is None
        assert not file.exists()

    @pytest.mark.parametrize(
        "digest", ["", "../../etc/passwd", "A" * 64, "a" * 63, f"{'a' * 64}\n", "/" * 64]
    )
    def test_a_digest_never_becomes_another_path(self, tmp_path: Path, digest: str) -> None:
        cache = TokenizerCache(tmp_path / "cache")
        cache.write(digest, self.DATA)
        assert cache.read(digest) is None
        assert list(tmp_path.iterdir()) == []

    def test_the_oldest_go_when_there_are_too_many(self, tmp_path: Path) -> None:
        cache = TokenizerCache(tmp_path)
        digests = [hashlib.sha256(bytes([number])).hexdigest() for number in range(MAX_FILES + 3)]
        for number, digest in enumerate(digests):
            cache.write(digest, bytes([number]))
            os.utime(tmp_path / f"{digest}.bundle", (number, number))
        cache.write(digests[-1], bytes([MAX_FILES + 2]))
        assert [cache.read(digest) is not None for digest in digests] == [False] * 3 + [True] * MAX_FILES

    def test_no_folder_or_one_that_can_not_be_made_is_an_empty_cache(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for folder in (None, tmp_path / "file" / "below"):
            cache = TokenizerCache(folder)
            cache.write(self.DIGEST, self.DATA)
            assert cache.read(self.DIGEST) is None


class TestModelTokenizer:
    @pytest.mark.parametrize(
        "bundle",
        [
            b"",
            b"not zlib",
            zlib.compress(b"not json"),
            zlib.compress(b"[]"),
            zlib.compress(b"{}"),
            zlib.compress(b'{"tokenizer": {"model": {"type": "Nonsense"}}}'),
            zlib.compress(b'{"tokenizer": {}}')[:-3],
        ],
    )
    def test_a_broken_bundle_is_a_clear_error(self, bundle: bytes) -> None:
        with pytest.raises(KVRelayError, match="tokenizer"):
            ModelTokenizer(bundle)

    def test_a_broken_template_is_a_clear_error(self, byte_level_tokenizer: Any, make_bundle: Any) -> None:
        with pytest.raises(KVRelayError, match="chat template can't be read"):
            ModelTokenizer(make_bundle(byte_level_tokenizer, chat_template="{% if %}"))

    def test_padding_and_truncation_of_a_tokenizer_file_are_left_off(
        self, byte_level_tokenizer: Any, make_bundle: Any
    ) -> None:
        copy = byte_level_tokenizer.from_str(byte_level_tokenizer.to_str())
        copy.enable_padding(length=64)
        copy.enable_truncation(max_length=2)
        tokenizer = ModelTokenizer(make_bundle(copy))
        assert list(tokenizer.encode("the lazy dog")) == byte_level_tokenizer.encode("the lazy dog").ids

    def test_tools_reach_the_template(self, byte_level_tokenizer: Any, make_bundle: Any) -> None:
        tokenizer = ModelTokenizer(make_bundle(byte_level_tokenizer, "{{ tools | tojson }}{{ bos_token }}"))
        token_ids = tokenizer.encode_chat([{"role": "user", "content": "x"}], tools=[{"name": "<f>é"}])
        assert tokenizer.decode(token_ids, skip_special_tokens=False) == '[{"name": "<f>é"}]<|im_start|>'


class TestChatTemplate:
    MESSAGES = ({"role": "user", "content": "hi"},)

    def render(self, source: str, **options: Any) -> str:
        return ChatTemplate(source, {"bos_token": "<s>"}).render(self.MESSAGES, **options)

    def test_what_templates_expect_is_there(self) -> None:
        assert self.render("{{ bos_token }}{{ messages[0].content }}") == "<s>hi"
        assert self.render("{% if tools %}x{% else %}none{% endif %}") == "none"
        assert self.render("{{ strftime_now('%Y') | length }}") == "4"
        assert self.render("{{ {'a': '<'} | tojson(indent=1) }}") == '{\n "a": "<"\n}'
        assert self.render("{% generation %}x{% endgeneration %}") == "x"
        assert (
            self.render("{% for m in [1, 2] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}")
            == "1"
        )
        assert self.render("  {% if add_generation_prompt %}\nyes\n  {% endif %}\n") == "yes\n"
        assert self.render("{{ add_generation_prompt }}", add_generation_prompt=False) == "False"
        assert self.render("{{ thinking }}", variables={"thinking": 5}) == "5"

    def test_a_template_may_refuse_messages(self) -> None:
        with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
            self.render("{{ raise_exception('roles must alternate') }}")
        assert caught.value.field == "messages"

    @pytest.mark.parametrize(
        "source",
        [
            "{{ messages[5].content.x.y }}",
            "{{ 1 / 0 }}",
            "{{ 'a' + 1 }}",
            "{{ messages.append(1) }}",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ range(10000000) | list }}",
            "{% for a in range(90000) %}{{ 'x' * 10000 }}{% endfor %}",
        ],
    )
    def test_whatever_a_template_trips_over_is_one_clear_error(self, source: str) -> None:
        with pytest.raises(InvalidRequest, match="chat template"):
            self.render(source)
