"""Rectangles of KV, layers x tokens: splitting and joining them for sending, and proving each sent once."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from kvrelay.core.errors import Overloaded, TransferCorrupt
from kvrelay.core.kv import KVLayout

MAX_READY_RANGES: Final = 4096


@dataclass(frozen=True, slots=True)
class KVRange:
    """KV of all of `layers` x `tokens`; both non-empty, step 1."""

    layers: range
    tokens: range

    def num_bytes(self, layout: KVLayout) -> int:
        return len(self.layers) * len(self.tokens) * layout.token_bytes_per_layer

    def __str__(self) -> str:
        return (
            f"layers [{self.layers.start}, {self.layers.stop})"
            f" x tokens [{self.tokens.start}, {self.tokens.stop})"
        )

    def joined_with(self, later: KVRange) -> KVRange | None:
        """The rectangle that both make up exactly, when they do."""
        if self.tokens == later.tokens and self.layers.stop == later.layers.start:
            return KVRange(range(self.layers.start, later.layers.stop), self.tokens)
        if self.layers == later.layers and self.tokens.stop == later.tokens.start:
            return KVRange(self.layers, range(self.tokens.start, later.tokens.stop))
        return None


class Coverage:
    """Whether every (layer, token in ``[first_token, num_tokens)``) came exactly once, tokens in order."""

    def __init__(self, num_layers: int, first_token: int, num_tokens: int) -> None:
        self._next_token = [first_token] * num_layers
        self._num_tokens = num_tokens

    def add(self, part: KVRange) -> None:
        """Count `part` as come.

        Raises:
            TransferCorrupt: it is out of bounds, out of order, or came before. Nothing is counted then.
        """
        if part.layers.start < 0 or part.layers.stop > len(self._next_token):
            raise TransferCorrupt(f"{part} lies outside of {len(self._next_token)} layers")
        if part.tokens.stop > self._num_tokens:
            raise TransferCorrupt(f"{part} lies outside of {self._num_tokens} tokens")
        for layer in part.layers:
            if self._next_token[layer] != part.tokens.start:
                raise TransferCorrupt(
                    f"{part} came where layer {layer} needs token {self._next_token[layer]}"
                )
        for layer in part.layers:
            self._next_token[layer] = part.tokens.stop

    def missing(self) -> str:
        """What has not come, readable; empty when everything has."""
        short = [layer for layer, token in enumerate(self._next_token) if token < self._num_tokens]
        if not short:
            return ""
        return f"layer {short[0]} ends at token {self._next_token[short[0]]} of {self._num_tokens}"


class ReadyQueue:
    """What may be sent, in order, joined into rectangles as large as possible."""

    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout
        self._ranges: deque[KVRange] = deque()
        self._first_token = 0

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def add(self, part: KVRange) -> None:
        """Append `part`, joining it with what came last where that makes a rectangle.

        Raises:
            Overloaded: more than `MAX_READY_RANGES` ranges that can't be joined.
        """
        if part.tokens.stop <= self._first_token:
            return
        part = KVRange(part.layers, range(max(part.tokens.start, self._first_token), part.tokens.stop))
        while self._ranges and (joined := self._ranges[-1].joined_with(part)):
            self._ranges.pop()
            part = joined
        if len(self._ranges) >= MAX_READY_RANGES:
            raise Overloaded(f"more than {MAX_READY_RANGES} ranges of KV wait to be sent")
        self._ranges.append(part)

    def drop_below(self, first_token: int) -> None:
        """Forget, now and later, the tokens before `first_token`: the receiver holds them already."""
        waiting, self._ranges = self._ranges, deque()
        self._first_token = first_token
        for part in waiting:
            self.add(part)

    def take(self, max_bytes: int) -> KVRange | None:
        """Remove and return the next message, at most `max_bytes` long (which holds a token of a layer)."""
        if not self._ranges:
            return None
        unit_bytes = self._layout.token_bytes_per_layer
        head = self._ranges.popleft()
        max_layers = max_bytes // unit_bytes
        if len(head.layers) > max_layers:
            first, rest = _split_layers(head, max_layers)
            self._ranges.appendleft(rest)
            head = first
        max_tokens = max_bytes // (unit_bytes * len(head.layers))
        if len(head.tokens) > max_tokens:
            cut = head.tokens.start + max_tokens
            self._ranges.appendleft(KVRange(head.layers, range(cut, head.tokens.stop)))
            head = KVRange(head.layers, range(head.tokens.start, cut))
        return head

    def num_messages(self, max_bytes: int, up_to: int) -> int:
        """How many messages `take` would give, counted no further than `up_to`."""
        count = 0
        for part in self._ranges:
            count += -(-part.num_bytes(self._layout) // max_bytes)
            if count >= up_to:
                return up_to
        return count


def _split_layers(whole: KVRange, max_layers: int) -> tuple[KVRange, KVRange]:
    cut = whole.layers.start + max_layers
    return (
        KVRange(range(whole.layers.start, cut), whole.tokens),
        KVRange(range(cut, whole.layers.stop), whole.tokens),
    )
