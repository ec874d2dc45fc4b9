"""Offers that came before anybody expected them, and how transfers ended that are over."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from kvrelay.core.errors import KVRelayError, Overloaded, TransferFailed
from kvrelay.core.ids import TransferId
from kvrelay.kv_transfer.messages import Offer

MAX_ENDED_IDS: Final = 4096


@dataclass(frozen=True, slots=True)
class PendingOffer:
    """`link_id` is the link that it came over."""

    offer: Offer
    link_id: int
    until_s: float


class OfferBook:
    """Bounded in count and time."""

    def __init__(self, max_pending: int, timeout_s: float) -> None:
        self._max_pending = max_pending
        self._timeout_s = timeout_s
        self._pending: OrderedDict[TransferId, PendingOffer] = OrderedDict()
        self._ended: OrderedDict[TransferId, KVRelayError] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pending)

    def keep(self, offer: Offer, link_id: int, now_s: float) -> None:
        """Hold the offer until somebody expects it.

        Raises:
            Overloaded: too many offers wait already.
            TransferFailed: that transfer is over, or offered already.
        """
        if offer.transfer_id in self._ended:
            raise TransferFailed(f"transfer {offer.transfer_id} is over")
        if offer.transfer_id in self._pending:
            raise TransferFailed(f"transfer {offer.transfer_id} is offered already")
        if len(self._pending) >= self._max_pending:
            raise Overloaded(f"{self._max_pending} offers wait to be expected already")
        self._pending[offer.transfer_id] = PendingOffer(offer, link_id, now_s + self._timeout_s)

    def take(self, transfer_id: TransferId) -> PendingOffer | None:
        """Remove and return that offer, if it waits."""
        return self._pending.pop(transfer_id, None)

    def withdraw(self, transfer_id: TransferId, link_id: int, error: KVRelayError) -> None:
        """The sender over that link takes its offer back: who expects it later gets `error` at once."""
        pending = self._pending.get(transfer_id)
        if pending is not None and pending.link_id == link_id:
            del self._pending[transfer_id]
            self.mark_ended(transfer_id, error)

    def drop_link(self, link_id: int, error: KVRelayError) -> None:
        """Withdraw the offers of a lost link."""
        for transfer_id in [key for key, value in self._pending.items() if value.link_id == link_id]:
            self.withdraw(transfer_id, link_id, error)

    def has_link(self, link_id: int) -> bool:
        return any(pending.link_id == link_id for pending in self._pending.values())

    def expire(self, now_s: float) -> list[PendingOffer]:
        """Remove and return the offers that nobody expected in time."""
        over = [pending for pending in self._pending.values() if pending.until_s <= now_s]
        for pending in over:
            error = TransferFailed(f"its offer was not expected within {self._timeout_s:g} s")
            self.withdraw(pending.offer.transfer_id, pending.link_id, error)
        return over

    def ended_error(self, transfer_id: TransferId) -> KVRelayError | None:
        """Why that transfer can't be expected any more, if it can't."""
        return self._ended.get(transfer_id)

    def mark_ended(self, transfer_id: TransferId, error: KVRelayError) -> None:
        """Refuse later offers of this transfer at once. The oldest of `MAX_ENDED_IDS` is forgotten."""
        self._ended[transfer_id] = error
        if len(self._ended) > MAX_ENDED_IDS:
            self._ended.popitem(last=False)
