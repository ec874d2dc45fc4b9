"""A model's tokenizer, as a router gives it: text to tokens, chat to tokens, tokens to text."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Final, Unpack

from tokenizers import Tokenizer

from kvrelay.client.chat_template import ChatTemplate, RenderOptions
from kvrelay.client.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from kvrelay.client.text_encoder import TextEncoder
from kvrelay.client.token_bytes import TokenBytes
from kvrelay.core.errors import InvalidRequest, KVRelayError

MAX_UNPACKED_BYTES: Final = 512 << 20
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-F]{2}>")


class ModelTokenizer:
    """Built from a tokenizer bundle: zlib-compressed JSON with ``tokenizer``, ``chat_template`` and
    ``special_tokens``. May be shared between threads. Remembers parts of texts in at most about
    `max_cache_bytes`; 0: none.

    Raises:
        KVRelayError: the bundle can't be read.
    """

    def __init__(self, bundle: bytes, *, max_cache_bytes: int = 32 << 20) -> None:
        content = _unpack(bundle)
        description = content["tokenizer"]
        assert isinstance(description, dict)
        try:
            # What is right for training batches would pad and cut prompts here.
            self.tokenizer: Tokenizer = Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # tokenizers raises bare Exception
            raise KVRelayError(f"the model's tokenizer can't be read: {error}") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.special_tokens: Mapping[str, str] = _special_tokens(content.get("special_tokens"))
        self._encoder = TextEncoder(self.tokenizer, description, max_cache_bytes=max_cache_bytes)
        template = content.get("chat_template")
        self.chat_template = (
            ChatTemplate(template, self.special_tokens) if isinstance(template, str) and template else None
        )
        self._special_ids = frozenset(
            token_id for token_id, token in self.tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._byte_ids = self._find_byte_ids(description)
        self._token_bytes = TokenBytes(self.tokenizer, _decoder_of(description))

    def encode(
        self, text: str, *, add_special_tokens: bool = True, cache_salt: bytes = b""
    ) -> tuple[int, ...]:
        """Token ids of `text`; `add_special_tokens` adds what the model wants around it (a BOS, mostly).

        What lies between special tokens is not tokenized again when it comes under the same `cache_salt`.
        """
        return self._encoder.encode(text, add_special_tokens=add_special_tokens, cache_salt=cache_salt)

    def encode_if_quick(
        self, text: str, *, add_special_tokens: bool = True, cache_salt: bytes = b""
    ) -> tuple[int, ...] | None:
        """As `encode`, but None if that would take more than about a millisecond."""
        return self._encoder.encode_if_quick(
            text, add_special_tokens=add_special_tokens, cache_salt=cache_salt
        )

    def render_chat(self, messages: Sequence[Mapping[str, object]], **options: Unpack[RenderOptions]) -> str:
        """A conversation as the model's chat template writes it.

        Raises:
            InvalidRequest: the model has no chat template, or it refuses these messages.
        """
        if self.chat_template is None:
            raise InvalidRequest(
                "messages can't be used: the model has no chat template; send a prompt", field="messages"
            )
        return self.chat_template.render(messages, **options)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        cache_salt: bytes = b"",
        **options: Unpack[RenderOptions],
    ) -> tuple[int, ...]:
        """Token ids of a conversation, by the model's chat template. Raises as `render_chat` does."""
        text = self.render_chat(messages, **options)
        return self.encode(text, add_special_tokens=False, cache_salt=cache_salt)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole token sequence."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(
        self, *, hidden_ids: Collection[int] = (), skip_special_tokens: bool = True
    ) -> Detokenizer:
        """A fresh incremental decoder, for one output; `hidden_ids` are not shown, and special tokens only
        without `skip_special_tokens`."""
        hidden = frozenset(hidden_ids)
        if skip_special_tokens:
            hidden |= self._special_ids
        if self._token_bytes.is_byte_level:
            return ByteDetokenizer(self._token_bytes, hidden_ids=hidden)

        def decode(token_ids: list[int]) -> str:
            return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

        return WindowDetokenizer(decode, hidden_ids=hidden, byte_ids=self._byte_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; empty for an id that the vocabulary does not have."""
        return self._token_bytes[token_id]

    def _find_byte_ids(self, tokenizer: object) -> frozenset[int]:
        if '"ByteFallback"' not in json.dumps(_decoder_of(tokenizer)):
            return frozenset()
        vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        return frozenset(token_id for token, token_id in vocab.items() if _BYTE_TOKEN.fullmatch(token))


def _decoder_of(tokenizer: object) -> object:
    return tokenizer.get("decoder") if isinstance(tokenizer, dict) else None


def _unpack(bundle: bytes) -> dict[str, object]:
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(bundle, MAX_UNPACKED_BYTES)
        if not unpacker.eof:
            raise ValueError(f"it is cut short, or over {MAX_UNPACKED_BYTES} bytes")
        content = json.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("tokenizer"), dict):
            raise ValueError("it holds no tokenizer")
    except (zlib.error, ValueError, RecursionError) as error:
        raise KVRelayError(f"the model's tokenizer bundle can't be read: {error}") from error
    return content


def _special_tokens(value: object) -> dict[str, str]:
    """Names to texts; a token is given as its text, or as an object with ``content``."""
    if not isinstance(value, dict):
        return {}
    texts = {
        name: token.get("content") if isinstance(token, dict) else token for name, token in value.items()
    }
    return {str(name): text for name, text in texts.items() if isinstance(text, str)}
