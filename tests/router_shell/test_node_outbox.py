"""What waits for a node goes out in frames that its gRPC takes."""

from __future__ import annotations

from kvrelay.codec.cluster import encode_router_frame
from kvrelay.core.ids import AttemptId
from kvrelay.core.node_messages import ReleaseKV, ReserveDecode
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import MAX_GRAMMAR_BYTES, Grammar, GrammarKind, SamplingParams
from kvrelay.router.node_outbox import MAX_BYTES_PER_FRAME, NodeOutbox


async def test_commands_with_large_grammars_do_not_share_a_frame() -> None:
    grammar = Grammar(GrammarKind.REGEX, "a" * MAX_GRAMMAR_BYTES)
    request = TokenRequest((1,), 1, SamplingParams(grammar=grammar))
    outbox = NodeOutbox(1000)
    for number in range(1, 401):
        assert outbox.put(ReserveDecode(AttemptId(number), request))
        assert outbox.put(ReleaseKV(AttemptId(number)))
    commands = []
    while len(commands) < 800:
        frame = await outbox.take()
        assert frame is not None
        assert encode_router_frame(frame).ByteSize() < MAX_BYTES_PER_FRAME * 1.1
        commands += [command.attempt for command in frame.commands]
    assert commands == [number for number in range(1, 401) for _ in range(2)]
