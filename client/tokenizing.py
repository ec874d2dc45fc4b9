"""Tokenizing for an event loop: what is quick is done at once, the rest on threads.

Tokenizers let other threads run while they work. Templates don't, but the interpreter takes turns between
threads, so a long one slows the loop down and does not stop it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar, Unpack

from kvrelay.client.chat_template import RenderOptions
from kvrelay.client.in_flight import InFlight
from kvrelay.client.model_tokenizer import ModelTokenizer
from kvrelay.core.errors import RequestCancelled

T = TypeVar("T")

_QUICK_RENDER_CHARS: Final = 32_768
_CHARS_PER_VALUE: Final = 16
"""A template takes about 0.1 µs for a value (a message, a field of a tool) and 0.01 µs for a character of
it, so `_QUICK_RENDER_CHARS` of both take some 0.3 ms."""
_QUICK_DECODE_TOKENS: Final = 4096
"""Decoding takes 0.12 µs a token."""


class Tokenizing:
    """At most `num_threads` texts at once are worked on off the event loop, which it is used on; at most
    `max_waiting` in all are under way."""

    def __init__(self, num_threads: int, *, max_waiting: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="kvrelay tokenizing")
        self._in_flight = InFlight(max_waiting)
        self._is_closed = False

    async def encode(
        self,
        tokenizer: ModelTokenizer,
        text: str,
        *,
        add_special_tokens: bool = True,
        cache_salt: bytes = b"",
    ) -> tuple[int, ...]:
        """As `ModelTokenizer.encode`.

        Raises:
            Overloaded: too many texts are waiting.
            RequestCancelled: the client was closed.
        """
        quick = tokenizer.encode_if_quick(text, add_special_tokens=add_special_tokens, cache_salt=cache_salt)
        if quick is not None:
            return quick
        return await self._run(
            lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens, cache_salt=cache_salt)
        )

    async def encode_chat(
        self,
        tokenizer: ModelTokenizer,
        messages: Sequence[Mapping[str, object]],
        *,
        cache_salt: bytes = b"",
        **options: Unpack[RenderOptions],
    ) -> tuple[int, ...]:
        """As `ModelTokenizer.encode_chat`.

        Raises:
            InvalidRequest: the model has no chat template, or it refuses these messages.
            Overloaded: too many texts are waiting.
            RequestCancelled: the client was closed.
        """
        if is_quick_to_render([messages, options.get("tools"), options.get("variables")]):
            text = tokenizer.render_chat(messages, **options)
        else:
            text = await self._run(lambda: tokenizer.render_chat(messages, **options))
        return await self.encode(tokenizer, text, add_special_tokens=False, cache_salt=cache_salt)

    async def decode(
        self, tokenizer: ModelTokenizer, token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> str:
        """As `ModelTokenizer.decode`. Raises as `encode` does."""
        if len(token_ids) <= _QUICK_DECODE_TOKENS:
            return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return await self._run(lambda: tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def close(self) -> None:
        """Give up what waits for a thread; nothing more is taken. What a thread is at ends by itself."""
        self._is_closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        if self._is_closed:
            raise RequestCancelled("the client was closed")
        self._in_flight.enter()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._is_closed and not (task and task.cancelling()):
                raise RequestCancelled("the client was closed") from None
            raise
        finally:
            self._in_flight.leave()


def is_quick_to_render(values: Sequence[object]) -> bool:
    """Whether a template takes less than about a millisecond for them, by their size."""
    room, waiting = _QUICK_RENDER_CHARS, list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            room -= len(value)
        elif isinstance(value, Mapping | list | tuple):
            room -= _CHARS_PER_VALUE * len(value)
            if room >= 0:
                waiting += value.values() if isinstance(value, Mapping) else value
        if room < 0:
            return False
    return True
