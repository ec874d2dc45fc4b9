"""Bugs to plant, one of each kind: the simulation has to find them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvrelay.core.ids import AttemptId
from kvrelay.core.node_messages import ReleaseKV
from kvrelay.engine.prefix_holds import PrefixHolds
from kvrelay.engine.scheduler import Scheduler
from kvrelay.kv_transfer.receiver import Receiver
from kvrelay.kv_transfer.scatters import Scatters
from kvrelay.node.core import NodeCore
from kvrelay.node.leases import Leases
from kvrelay.router.core import RouterCore
from kvrelay.router.events import DeliverTokens, SendCommand
from kvrelay.router.ledger import Ledger

Plant = Callable[[pytest.MonkeyPatch], None]


class Once:
    """True at the `number`-th time that it is asked, and never again."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def skip_a_release_command(patch: pytest.MonkeyPatch) -> None:
    """A router forgets to tell a node that it may let go."""
    handle, is_now = RouterCore.handle, Once(3)

    def planted(core: RouterCore, event: Any, now_s: float) -> list[Any]:
        return [
            effect
            for effect in handle(core, event, now_s)
            if not (isinstance(effect, SendCommand) and isinstance(effect.command, ReleaseKV) and is_now())
        ]

    patch.setattr(RouterCore, "handle", planted)


def skip_a_sequence_release(patch: pytest.MonkeyPatch) -> None:
    """A node's engine keeps what it was told to free."""
    release, is_now = Scheduler.release, Once(5)

    def planted(scheduler: Scheduler, key: Any) -> None:
        if not is_now():
            release(scheduler, key)

    patch.setattr(Scheduler, "release", planted)


def deliver_a_token_twice(patch: pytest.MonkeyPatch) -> None:
    """A router says the last token of one delivery again."""
    handle, is_now = RouterCore.handle, Once(20)

    def planted(core: RouterCore, event: Any, now_s: float) -> list[Any]:
        effects = handle(core, event, now_s)
        for effect in effects:
            if isinstance(effect, DeliverTokens) and is_now():
                effect.stream_ids = [*effect.stream_ids, effect.stream_ids[-1]]
                effect.counts = [*effect.counts, 1]
                effect.token_ids = [*effect.token_ids, effect.token_ids[-1]]
        return effects

    patch.setattr(RouterCore, "handle", planted)


def reuse_a_transfer_id(patch: pytest.MonkeyPatch) -> None:
    """A router gives an attempt the id of one that is over."""
    next_attempt_id, is_now = Ledger.next_attempt_id, Once(6)

    def planted(ledger: Ledger) -> AttemptId:
        if ledger.num_attempts_ever and is_now():
            unused = [
                number for number in range(1, ledger.num_attempts_ever) if number not in ledger.attempts
            ]
            if unused:
                return AttemptId(unused[0])
        return next_attempt_id(ledger)

    patch.setattr(Ledger, "next_attempt_id", planted)


def ignore_a_lease(patch: pytest.MonkeyPatch) -> None:
    """A node forgets a lease that has run out, with what it holds under it."""
    take_expired, is_now = Leases.take_expired, Once(1)

    def planted(leases: Leases, now_s: float) -> list[int]:
        expired = take_expired(leases, now_s)
        return [] if expired and is_now() else expired

    patch.setattr(Leases, "take_expired", planted)


def reuse_slots_without_quarantine(patch: pytest.MonkeyPatch) -> None:
    """A receiver hands out slots of a dead transfer that its sender may still write to."""

    def planted(receiver: Any, transfer_id: Any, link: Any) -> None:
        receiver._pool.release(transfer_id)

    patch.setattr(Receiver, "_quarantine", planted)


def skip_checksums(patch: pytest.MonkeyPatch) -> None:
    """A receiver believes whatever it finds in a slot."""
    patch.setattr(Scatters, "_wrong_checksum", lambda *_: None)


def free_before_the_transfer_is_cancelled(patch: pytest.MonkeyPatch) -> None:
    """A node frees blocks that a transfer still reads or writes."""
    end = NodeCore._end

    def planted(core: Any, attempt: Any, terminal: Any, out: Any) -> None:
        if attempt.has_transfer:
            attempt.has_transfer = False
        end(core, attempt, terminal, out)

    patch.setattr(NodeCore, "_end", planted)


def keep_a_pin(patch: pytest.MonkeyPatch) -> None:
    """A node that has sent a prefix never lets go of it."""
    release, is_now = PrefixHolds.release, Once(3)

    def planted(holds: PrefixHolds, key: Any) -> None:
        if holds.held(key) is None or not is_now():
            release(holds, key)

    patch.setattr(PrefixHolds, "release", planted)


def keep_pulled_blocks_under_wrong_tokens(patch: pytest.MonkeyPatch) -> None:
    """A node enters what it has pulled into its prefix cache, each block as the one before it."""
    keep = PrefixHolds.keep

    def planted(holds: PrefixHolds, key: Any, num_tokens: int) -> int:
        held = holds.held(key)
        if held is not None and held.num_cached_blocks == 0:
            held.hashes[:] = [*held.hashes[1:], *held.hashes[:1]]
        return keep(holds, key, num_tokens)

    patch.setattr(PrefixHolds, "keep", planted)


PLANTS: tuple[Plant, ...] = (
    skip_a_release_command,
    skip_a_sequence_release,
    deliver_a_token_twice,
    reuse_a_transfer_id,
    ignore_a_lease,
    reuse_slots_without_quarantine,
    skip_checksums,
    free_before_the_transfer_is_cancelled,
    keep_a_pin,
    keep_pulled_blocks_under_wrong_tokens,
)
