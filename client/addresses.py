"""Router addresses as people write them, and the order in which a client tries them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

from kvrelay.core.errors import ConfigError

DEFAULT_PORT: Final = 7070
MAX_ADDRESSES: Final = 64
_ADDRESS: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+)(:(?P<port>[0-9]{1,5}))?")


def parse_addresses(addresses: str | Sequence[str]) -> tuple[str, ...]:
    """``host[:port]`` each, IPv6 in brackets; one string may hold several, separated by commas.

    The port is 7070 unless given; doubles are dropped.

    Raises:
        ConfigError: none is given, too many are, or one can't be read; names it. `field` is ``addresses``.
    """
    if isinstance(addresses, str):
        addresses = addresses.split(",")
    if not all(isinstance(address, str) for address in addresses):
        raise ConfigError(f"addresses must be strings, got {addresses!r}", field="addresses")
    found = tuple(dict.fromkeys(_parse(address.strip()) for address in addresses))
    if not 1 <= len(found) <= MAX_ADDRESSES:
        raise ConfigError(
            f"addresses must hold 1 to {MAX_ADDRESSES} router addresses, got {len(found)}", field="addresses"
        )
    return found


def _parse(address: str) -> str:
    match = _ADDRESS.fullmatch(address)
    port = int(match["port"] or DEFAULT_PORT) if match else 0
    if match is None or not 1 <= port <= 65_535:
        raise ConfigError(
            f"addresses must hold host:port (IPv6 as [host]:port), got {address!r}", field="addresses"
        )
    return f"{match['host']}:{port}"


@dataclass(slots=True)
class _Health:
    num_failures: int = 0
    down_until_s: float = 0.0


@dataclass(slots=True)
class RouterRotation:
    """Which router to ask next: those believed well in turn, then the others, soonest back first.

    Starts at a random one, so that many clients spread over the routers.
    """

    addresses: tuple[str, ...]
    rng: Random
    backoff_base_s: float
    backoff_max_s: float
    _next: int = field(init=False)
    _health: dict[str, _Health] = field(init=False)

    def __post_init__(self) -> None:
        self._next = self.rng.randrange(len(self.addresses))
        self._health = {address: _Health() for address in self.addresses}

    def order(self, now_s: float, *, last: str = "") -> tuple[str, ...]:
        """All addresses, best first; moves on by one. `last`, just seen failing, is put behind its equals."""
        start, self._next = self._next, (self._next + 1) % len(self.addresses)
        turn = self.addresses[start:] + self.addresses[:start]
        well = [address for address in turn if self._health[address].down_until_s <= now_s]
        down = [address for address in turn if self._health[address].down_until_s > now_s]
        well.sort(key=lambda address: address == last)
        down.sort(key=lambda address: self._health[address].down_until_s)
        return (*well, *down)

    def mark_failed(self, address: str, now_s: float) -> None:
        """Ask others first for a while that doubles with each failure in a row.

        Within that while nothing changes: many requests see one loss.
        """
        health = self._health[address]
        if health.down_until_s > now_s:
            return
        pause_s = min(self.backoff_base_s * 2.0 ** min(health.num_failures, 30), self.backoff_max_s)
        health.num_failures += 1
        health.down_until_s = now_s + pause_s

    def mark_well(self, address: str) -> None:
        """It has just served something: no grudge is left."""
        if self._health[address].num_failures:
            self._health[address] = _Health()
