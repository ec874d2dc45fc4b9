"""What strikes a request: the columns of the matrix."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from kvrelay.core.cluster_view import ClusterState
from tests.fault_matrix.breakable_cluster import NODES, PROXY, NotSeen
from tests.fault_matrix.proxy_caller import ProxyCaller
from tests.fault_matrix.relay import Relay
from tests.fault_matrix.scene import Scene

Strike = Callable[[Scene], Awaitable[None]]
Target = Callable[[Scene], str]


@dataclass(frozen=True, slots=True)
class Fault:
    """A column. `strike` makes it happen, calls `Scene.strike` at that moment, goes on with what follows (a
    stopped process continues, a cut link is mended), and returns when nothing follows any more."""

    key: str
    title: str
    strike: Strike


def _prefill(scene: Scene) -> str:
    return scene.prefill


def _decode(scene: Scene) -> str:
    return scene.decode


def _router(scene: Scene) -> str:
    return scene.router


def _proxy(_: Scene) -> str:
    return PROXY


async def _nothing(scene: Scene) -> None:
    scene.strike()
    await scene.let_go()


async def _kill(target: Target, scene: Scene) -> None:
    scene.strike()
    await scene.cluster.kill(target(scene))
    await scene.let_go()


async def _stop_node(target: Target, scene: Scene) -> None:
    name = target(scene)
    scene.cluster.pause(name)
    scene.strike()
    await scene.let_go()
    await scene.cluster.until(
        f"the routers count {name} as lost",
        lambda states: all(name not in _attached(state) for state in states.values()),
    )
    scene.cluster.resume(name)
    scene.lift()


async def _stop_router(scene: Scene) -> None:
    scene.cluster.pause(scene.router)
    scene.strike()
    await scene.let_go()
    await scene.it.ended.wait()
    await _until_nodes_are_free(scene)
    scene.cluster.resume(scene.router)
    scene.lift()


async def _cut_kv(scene: Scene) -> None:
    relays = scene.cluster.kv[scene.kv_receiver]
    for relay in relays:
        relay.cut()
    scene.strike()
    await scene.let_go()
    await scene.it.ended.wait()
    for relay in relays:
        relay.mend()
    scene.lift()


async def _silence_kv(scene: Scene) -> None:
    relays = scene.cluster.kv[scene.kv_receiver]
    for relay in relays:
        relay.silence()
    scene.strike()
    scene.held = [relay for relay in scene.held if relay not in relays]
    await scene.let_go()
    await scene.it.ended.wait()
    for relay in relays:
        relay.mend()
    scene.lift()


async def _cut_stream(target: Target, scene: Scene) -> None:
    stream = scene.cluster.streams[target(scene), scene.router]
    stream.cut()
    scene.strike()
    await _until_free_without(stream, scene)


async def _silence_stream(target: Target, scene: Scene) -> None:
    stream = scene.cluster.streams[target(scene), scene.router]
    stream.silence()
    scene.strike()
    scene.held = [relay for relay in scene.held if relay is not stream]
    await _until_free_without(stream, scene)


async def _until_free_without(stream: Relay, scene: Scene) -> None:
    """The stream is mended when the other router has heard from the nodes that all is free: at the latest the
    lease sees to that."""
    await scene.let_go()
    await scene.it.ended.wait()
    await _until_nodes_are_free(scene)
    stream.mend()
    scene.lift()


async def _cut_client(scene: Scene) -> None:
    door = scene.cluster.doors[scene.router]
    door.cut()
    scene.strike()
    await scene.let_go()
    await scene.it.ended.wait()
    door.mend()
    scene.lift()


async def _client_leaves(scene: Scene) -> None:
    """The proxy's client closes its connection; the library's are reset."""
    doors = [] if isinstance(scene.it, ProxyCaller) else list(scene.cluster.doors.values())
    for door in doors:
        door.cut()
    scene.strike()
    await scene.it.leave()
    await scene.let_go()
    for door in doors:
        door.mend()


async def _kill_proxy(scene: Scene) -> None:
    scene.it.may_break = True
    await _kill(_proxy, scene)


async def _drain(target: Target, scene: Scene) -> None:
    name = target(scene)
    scene.cluster.tell_to_drain(name)
    scene.strike()
    await scene.let_go()
    status = await scene.cluster.exit_status(name)
    if status != 0:
        scene.remarks.append(f"{name} left with exit status {status}")
    scene.lift()


def _attached(state: ClusterState) -> set[str]:
    return {str(node.node_id) for node in state.nodes}


async def _until_nodes_are_free(scene: Scene) -> None:
    """Seen through the router that is not struck. A leak is for the cell to find, so this gives up on one."""
    other = scene.other_router

    def are_free(states: dict[str, ClusterState]) -> bool:
        state = states.get(other)
        return (
            state is not None
            and len(state.nodes) == len(NODES)
            and all(node.load is not None and node.load.num_held_blocks == 0 for node in state.nodes)
        )

    try:
        await scene.cluster.until("no node holds a block", are_free)
    except NotSeen as error:
        scene.remarks.append(str(error))


FAULTS: Final = (
    Fault("none", "nothing", _nothing),
    Fault("kill_prefill", "kill -9 prefill", partial(_kill, _prefill)),
    Fault("kill_decode", "kill -9 decode", partial(_kill, _decode)),
    Fault("kill_router", "kill -9 router", partial(_kill, _router)),
    Fault("kill_proxy", "kill -9 proxy", _kill_proxy),
    Fault("stop_prefill", "SIGSTOP prefill", partial(_stop_node, _prefill)),
    Fault("stop_decode", "SIGSTOP decode", partial(_stop_node, _decode)),
    Fault("stop_router", "SIGSTOP router", _stop_router),
    Fault("cut_kv", "KV link cut", _cut_kv),
    Fault("silence_kv", "KV link silent", _silence_kv),
    Fault("cut_prefill_stream", "prefill–router cut", partial(_cut_stream, _prefill)),
    Fault("cut_decode_stream", "decode–router cut", partial(_cut_stream, _decode)),
    Fault("silence_prefill_stream", "prefill–router silent", partial(_silence_stream, _prefill)),
    Fault("silence_decode_stream", "decode–router silent", partial(_silence_stream, _decode)),
    Fault("cut_client", "client–router cut", _cut_client),
    Fault("drain_prefill", "SIGTERM prefill", partial(_drain, _prefill)),
    Fault("drain_decode", "SIGTERM decode", partial(_drain, _decode)),
    Fault("drain_router", "SIGTERM router", partial(_drain, _router)),
    Fault("drain_proxy", "SIGTERM proxy", partial(_drain, _proxy)),
    Fault("client_leaves", "client goes away", _client_leaves),
)
