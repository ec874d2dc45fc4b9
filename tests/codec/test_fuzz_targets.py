"""The targets of `make fuzz-decoders` take what honest processes say, and let through what is a bug."""

from __future__ import annotations

import pytest

from kvrelay.codec import cluster
from kvrelay.kv_transfer.frame_reader import FrameReader
from kvrelay.v1 import cluster_pb2
from tests.fuzz_decoders import targets
from tests.fuzz_decoders.seeds import seeds


@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_target_takes_its_seeds_and_noise(name: str) -> None:
    for seed in seeds()[name]:
        targets.TARGETS[name](seed)
        targets.TARGETS[name](seed[:-3])
        targets.TARGETS[name](seed[::-1])


def test_seeds_are_taken_whole() -> None:
    """Else the fuzzer would begin with what is refused."""
    made = seeds()
    assert len(FrameReader().feed(made["kv_wire"][0])) == 9
    decode_tokens = cluster.TokenBatchDecoder().decode
    messages = targets._messages(made["node_frame"][0], cluster_pb2.NodeFrame)
    assert len([cluster.decode_node_frame(message, decode_tokens) for message in messages]) == 4


def test_a_bug_of_a_decoder_is_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_message: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(targets, "decode_kv_event", broken)
    with pytest.raises(ValueError, match="a bug"):
        targets.TARGETS["kv_event"](seeds()["kv_event"][0])
