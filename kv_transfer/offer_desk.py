"""Takes offers in: keeps what comes too early, and tells senders of what nobody wants."""

from __future__ import annotations

from collections.abc import Mapping

from kvrelay.core.errors import KVRelayError, TransferFailed
from kvrelay.core.ids import TransferId
from kvrelay.kv_transfer.incoming_link import IncomingLink
from kvrelay.kv_transfer.messages import Abort, Offer
from kvrelay.kv_transfer.offer_book import OfferBook, PendingOffer


class OfferDesk:
    """Over `book`; `links` are those that offers come over, by id."""

    def __init__(self, book: OfferBook, links: Mapping[int, IncomingLink], timeout_s: float) -> None:
        self.book = book
        self._links = links
        self._timeout_s = timeout_s

    def keep(self, link: IncomingLink, offer: Offer, now_s: float) -> None:
        """Hold the offer until somebody expects it, or tell its sender why not."""
        try:
            self.book.keep(offer, link.link_id, now_s)
        except KVRelayError as error:
            self.decline(link, offer.transfer_id, error)

    def take(self, transfer_id: TransferId) -> tuple[IncomingLink, Offer] | None:
        """Remove and return that offer, and the link it came over, if both are there."""
        pending = self.book.take(transfer_id)
        link = None if pending is None else self._links.get(pending.link_id)
        return None if pending is None or link is None else (link, pending.offer)

    def decline(self, link: IncomingLink, transfer_id: TransferId, error: KVRelayError) -> None:
        """Tell the sender that its transfer is over."""
        link.connection.send(Abort(transfer_id, error.code, error.message))

    def refuse(self, transfer_id: TransferId) -> None:
        """Nobody expects this transfer: its sender is told, now or when it offers it."""
        error = TransferFailed(f"transfer {transfer_id} is not wanted any more")
        pending = self.book.take(transfer_id)
        self.book.mark_ended(transfer_id, error)
        if pending is not None:
            self._decline_pending(pending, error)

    def expire(self, now_s: float) -> None:
        """Tell the senders of the offers that nobody expected in time."""
        for pending in self.book.expire(now_s):
            text = f"nobody expected the transfer within {self._timeout_s:g} s"
            self._decline_pending(pending, TransferFailed(text))

    def _decline_pending(self, pending: PendingOffer, error: KVRelayError) -> None:
        if (link := self._links.get(pending.link_id)) is not None:
            self.decline(link, pending.offer.transfer_id, error)
