"""What a fake node sends to others that pull."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvrelay.core.ids import AttemptId
from kvrelay.core.node_messages import AttemptFailed, KVReleased, SendPrefix

if TYPE_CHECKING:
    from tests.router.fake_node import FakeNode


class FakeSends:
    """Keeps a sender's contract: each prefix is held until one terminal report."""

    def __init__(self, node: FakeNode) -> None:
        self._node = node
        self.prefixes: dict[AttemptId, SendPrefix] = {}

    def start(self, command: SendPrefix) -> None:
        self.prefixes[command.attempt] = command
        self._node.later(lambda: self._send(command.attempt))

    def _send(self, pull_id: AttemptId) -> None:
        """The other node has the prefix, if it wants it; or the link breaks, and this one alone knows."""
        command, world = self.prefixes.get(pull_id), self._node.world
        if command is None:
            return
        peer = world.nodes[command.address]
        if not peer.is_up or world.chance("push"):
            del self.prefixes[pull_id]
            self._node.say(AttemptFailed(pull_id, "TRANSFER_FAILED", "it broke"))
            return
        for attempt, held in peer.held.items():
            if held.pull is not None and held.pull.attempt == pull_id:
                assert command.prefix.token_ids == held.request.token_ids[: held.pull.num_tokens]
                held.pull, held.num_pulled_tokens = None, len(command.prefix.token_ids)
                world.num_pulls_done += 1
                peer.later(lambda attempt=attempt: peer.prefill(attempt))  # type: ignore[misc]
                self._node.later(lambda: self._sent(pull_id))
                return
        # It was offered too early or too late: it waits, and asks again, until it is released.
        self._node.later(lambda: self._send(pull_id))

    def _sent(self, pull_id: AttemptId) -> None:
        if self.prefixes.pop(pull_id, None) is not None:
            self._node.say(KVReleased(pull_id))
