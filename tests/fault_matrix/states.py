"""The states of a request in which faults strike, and how one is brought there.

Nothing here waits for time to pass: a state is seen in what routers and nodes say, or made to last by a relay
that holds a message back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from kvrelay.core.node_messages import NodeLoad
from kvrelay.core.sampling import SamplingParams
from tests.fault_matrix.breakable_cluster import DECODE, PREFILL, ROUTERS, NotSeen
from tests.fault_matrix.scene import Scene

MAX_PREFILLS_PER_NODE: Final = 2
NODE_ARGUMENTS: Final = (
    "--model=sim",
    "--engine.tokenizer=smollm2",
    "--num-blocks=2048",
    "--max-num-batched-tokens=64",
    "--slot-bytes=16384",
    "--sim-prefill-base-s=0.04",
    "--sim-decode-base-s=0.02",
)
"""A prefill of 64 tokens takes 40 ms, a decode step 20 ms: long enough to be seen."""
ROUTER_ARGUMENTS: Final = (f"--max-prefill-requests-per-node={MAX_PREFILLS_PER_NODE}",)
_HELD_AFTER_BYTES: Final = 12_000
_LONG, _SHORT, _OUTPUT = 2400, 400, 60
_NUM_BLOCKERS: Final = 6
_SEEN_PIECES: Final = 8


@dataclass(frozen=True, slots=True)
class State:
    """A row of the matrix. `reach` brings a scene's request there."""

    key: str
    title: str
    reach: Callable[[Scene], Awaitable[None]]
    seen_by: str
    """What tells that it is there."""


async def _queued(scene: Scene) -> None:
    for router in ROUTERS:
        for _ in range(_NUM_BLOCKERS):
            scene.block(router, _LONG)
    await scene.cluster.until(
        "requests are queued at both routers",
        lambda states: all(state.num_requests.get("queued", 0) > 1 for state in states.values()),
    )
    before = {name: state.counters["requests"] for name, state in (await scene.cluster.states()).items()}
    scene.ask(scene.prompt(_LONG), _OUTPUT)

    async def has_come() -> bool:
        for name, state in (await scene.cluster.states()).items():
            if state.counters["requests"] > before.get(name, 1 << 60):
                scene.router = name
                return True
        return False

    await scene.until("a router has the request", has_come)
    if await scene.cluster.explanation(scene.it.request_id) is not None:
        raise NotSeen("the request was placed before it was seen queued")


async def _waiting(scene: Scene) -> None:
    for prefill in PREFILL:
        scene.block(ROUTERS[0], _LONG, order=f".{prefill}.-.0")
    await scene.cluster.until(
        "both prefill nodes compute",
        lambda states: (
            ROUTERS[0] in states
            and all(
                node.load is not None and node.load.num_running
                for node in states[ROUTERS[0]].nodes
                if node.node_id in PREFILL
            )
        ),
    )
    scene.ask(scene.prompt(_SHORT), _OUTPUT)

    def has_room_and_waits(loads: dict[str, NodeLoad]) -> bool:
        return loads[scene.prefill].num_waiting > 0 and loads[scene.decode].num_held_blocks > 0

    await scene.until_placed("prefilling", lambda _, loads: has_room_and_waits(loads))


async def _prefilling(scene: Scene) -> None:
    scene.ask(scene.prompt(_LONG), _OUTPUT)

    def computes(loads: dict[str, NodeLoad]) -> bool:
        return loads[scene.prefill].num_running > 0 and loads[scene.decode].num_open_transfers > 0

    await scene.until_placed("prefilling", lambda _, loads: computes(loads))


def _hold_kv_to(scene: Scene, nodes: tuple[str, ...]) -> None:
    for name in nodes:
        relay = scene.cluster.kv[name][1]
        relay.hold_forth(_HELD_AFTER_BYTES)
        scene.held.append(relay)


def _holds_kv(scene: Scene) -> bool:
    return scene.cluster.kv[scene.kv_receiver][1].holds_back


async def _transferring(scene: Scene) -> None:
    _hold_kv_to(scene, DECODE)
    scene.ask(scene.prompt(_LONG), _OUTPUT)
    await scene.until_placed("prefilling", lambda *_: _holds_kv(scene))


async def _first_token(scene: Scene) -> None:
    _hold_kv_to(scene, DECODE)
    scene.ask(scene.prompt(_SHORT), _OUTPUT)
    await scene.until_placed("handing_off", lambda *_: _holds_kv(scene) and len(scene.it.pieces) == 1)


async def _pulling(scene: Scene) -> None:
    prefix = scene.prompt(_LONG)
    await _complete_on(scene, "p0", prefix)
    _hold_kv_to(scene, ("p1",))
    num_tokens = _LONG // 16 * 16
    scene.ask((*prefix, *scene.prompt(_SHORT)), _OUTPUT, order=f".p1.p0.{num_tokens}")

    def is_pulling(loads: dict[str, NodeLoad]) -> bool:
        return scene.cluster.kv["p1"][1].holds_back and loads["p0"].num_open_transfers > 0

    await scene.until_placed("prefilling", lambda _, loads: is_pulling(loads))
    scene.kv_receiver = "p1"


async def _complete_on(scene: Scene, prefill: str, prompt: tuple[int, ...]) -> None:
    name = f"first{scene.rng.randrange(1 << 40):x}.{prefill}.-.0"
    one_token = SamplingParams(max_tokens=1)
    await scene.client.complete(prompt, request_id=name, decode_text=False, sampling=one_token)
    await scene.cluster.until_whole()


async def _sending_prefix(scene: Scene) -> None:
    await _pulling(scene)
    scene.prefill = "p0"


async def _decoding(scene: Scene) -> None:
    scene.ask(scene.prompt(_SHORT), _OUTPUT)
    await scene.until_placed("decoding", lambda *_: len(scene.it.pieces) >= _SEEN_PIECES)


async def _decoding_for_proxy(scene: Scene) -> None:
    await scene.ask_proxy(_OUTPUT)
    await scene.until_placed("decoding", lambda *_: len(scene.it.pieces) >= _SEEN_PIECES)


async def _finished(scene: Scene) -> None:
    await _first_token(scene)
    stream = scene.cluster.streams[scene.prefill, scene.router]
    stream.forth.hold_after(0)
    scene.cluster.kv[scene.kv_receiver][1].let_pass()
    scene.held.append(stream)
    await scene.it.ended.wait()
    await _until_releasing(scene)


async def _cancelled(scene: Scene) -> None:
    await _transferring(scene)
    for name in (scene.prefill, scene.decode):
        stream = scene.cluster.streams[name, scene.router]
        stream.forth.hold_after(0)
        scene.held.append(stream)
    await scene.cluster.observers[scene.router].cancel(scene.it.request_id)
    await scene.it.ended.wait()
    await _until_releasing(scene)


async def _until_releasing(scene: Scene) -> None:
    await scene.cluster.until(
        "the router waits for a release",
        lambda states: scene.router in states and states[scene.router].num_requests.get("releasing", 0) > 0,
    )


STATES: Final = (
    State(
        "queued",
        "queued: no node has room",
        _queued,
        "its router has it and has not placed it, others are queued before it",
    ),
    State(
        "waiting",
        "reserved, its prefill waits",
        _waiting,
        "its prefill node has it waiting behind another prompt, its decode node holds blocks",
    ),
    State(
        "prefilling",
        "prefilling, KV is pushed as it is computed",
        _prefilling,
        "the ledger has it prefilling, its prefill node computes, its decode node has an open transfer",
    ),
    State(
        "transferring",
        "prefilling, a KV message half-way",
        _transferring,
        "the link has passed 12 kB of KV and holds the rest back",
    ),
    State(
        "first_token",
        "first token out, KV half-way",
        _first_token,
        "the client has one token, the ledger has it handing off, the link holds KV back",
    ),
    State(
        "pulling",
        "pulling a prefix (prefill node: the one that pulls)",
        _pulling,
        "the link to its prefill node has passed 12 kB of the prefix and holds the rest back",
    ),
    State(
        "sending_prefix",
        "pulling a prefix (prefill node: the one that sends)",
        _sending_prefix,
        "as above",
    ),
    State("decoding", "decoding", _decoding, "the client has eight tokens, the ledger has it decoding"),
    State(
        "proxied",
        "decoding, asked through the OpenAI proxy",
        _decoding_for_proxy,
        "eight events with text have come over HTTP, the ledger has the request decoding",
    ),
    State(
        "finished",
        "finished, a release not yet acknowledged",
        _finished,
        "the client has the whole answer; the prefill node's last report is held back",
    ),
    State(
        "cancelled",
        "cancelled mid-transfer, both releases not yet acknowledged",
        _cancelled,
        "the client was told; both nodes' reports are held back",
    ),
)
