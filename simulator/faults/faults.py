"""Everything that breaks, and how it is made whole again."""

from __future__ import annotations

from collections.abc import Callable

from kvrelay.core.errors import KVRelayError
from kvrelay.core.ids import TransferId
from kvrelay.kv_transfer.frame_reader import FrameReader, frame_bytes
from kvrelay.kv_transfer.messages import Frame
from kvrelay.simulator.faults.cluster import Cluster
from kvrelay.simulator.faults.network import End
from kvrelay.simulator.faults.node_process import SimNode
from kvrelay.simulator.faults.process import Process
from kvrelay.simulator.faults.router_process import SimRouter
from kvrelay.simulator.faults.scenario import FAULTS_END_S, draw_node


class FaultInjector:
    """Injects the scenario's faults into a cluster; `counts` says how many of each kind happened."""

    def __init__(self, cluster: Cluster) -> None:
        self.counts: dict[str, int] = {}
        self._cluster = cluster
        self._world = cluster.world
        self._network = cluster.network
        self._acts: dict[str, Callable[[], None]] = {
            "kill_node": self._kill_node,
            "kill_router": self._kill_router,
            "pause": self._pause,
            "cut": self._cut,
            "reset_stream": self._reset_stream,
            "slow_engine": self._slow_engine,
            "slow_network": self._slow_network,
            "drain_node": self._drain_node,
            "drain_router": self._drain_router,
            "duplicate": self._duplicate,
            "corrupt_kv": self._corrupt_kv,
            "reset_kv_link": self._reset_kv_link,
            "late_kv_frames": self._late_kv_frames,
            "drop_sessions": self._drop_sessions,
        }

    def plan(self) -> None:
        """Draw when what happens, and when all of it is over."""
        rng, scenario = self._world.rng, self._cluster.scenario
        if scenario.is_rolling_restart:
            self._world.at(1.0, lambda: self._restart_next(0))
        for _ in range(scenario.num_faults):
            kind = rng.choice(scenario.fault_kinds)
            self._world.at(self._draw_time_s(), lambda kind=kind: self._act(kind))  # type: ignore[misc]
        self._world.at(FAULTS_END_S, self._mend)

    def _draw_time_s(self) -> float:
        """Mostly a moment after somebody has asked: then something is under way."""
        rng = self._world.rng
        if rng.random() < 0.3:
            return rng.uniform(0.5, FAULTS_END_S)
        return min(FAULTS_END_S - 0.1, rng.choice(self._cluster.ask_times_s) + rng.expovariate(4.0))

    def _act(self, kind: str) -> None:
        self._act_on(kind)
        self._acts[kind]()

    def _act_on(self, kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def _say(self, text: str) -> None:
        self._world.say("FAULT", text)

    def _length_s(self) -> float:
        """Of something that passes: short or long, but not after the faults' end."""
        rng = self._world.rng
        length_s = rng.choice((0.05, 0.5, 2.0, 8.0)) * rng.uniform(0.5, 1.5)
        return max(0.0, min(length_s, FAULTS_END_S - self._world.now_s - 0.01))

    def _mend(self) -> None:
        self._say("all is mended")
        self._network.heal()
        self._network.slowness.clear()
        self._network.duplicate_rate = 0.0
        self._cluster.fabric.faults.corrupt_rate = self._cluster.fabric.faults.write_s = 0.0
        for process in self._cluster.processes:
            self._cluster.disturb(process)
            if process.is_paused:
                process.resume()
        for node in self._cluster.nodes:
            if node.process.is_alive:
                node.slow_down(1.0)
        self._restart_dead()

    def _restart_dead(self) -> None:
        """What leaves by itself after the end is started again, too."""
        for owner in self._cluster.servers:
            if not owner.process.is_alive:
                owner.start()
        if self._world.now_s < FAULTS_END_S + 4.0:
            self._world.after(0.5, self._restart_dead)

    # ---- processes ---------------------------------------------------------------------------------

    def _kill_node(self) -> None:
        self._kill(self._world.rng.choice(self._cluster.nodes))

    def _kill_router(self) -> None:
        self._kill(self._world.rng.choice(self._cluster.routers))

    def _kill(self, owner: SimNode | SimRouter) -> None:
        process, rng = owner.process, self._world.rng
        if not process.is_alive:
            return
        how = rng.choice(("closes its streams", "closes its streams", "drops what is sent", "says nothing"))
        self._say(f"kill {process.name}, which {how}")
        for end in self._network.ends_of(process):
            if how == "says nothing":
                end.vanish()
            else:
                end.abandon(drops_messages=how.startswith("drops"))
        process.kill()
        self._world.after(self._length_s() + 0.01, lambda: self._restart(owner))

    def _restart(self, owner: SimNode | SimRouter) -> None:
        """Now and then it comes back as another one under the same name."""
        if owner.process.is_alive:
            return
        if isinstance(owner, SimNode) and self._world.rng.random() < 0.3:
            owner.config = draw_node(self._world.rng, owner.config)
        owner.start()

    def _pause(self) -> None:
        process = self._world.rng.choice(self._cluster.processes)
        if not process.is_alive or process.is_paused:
            return
        length_s = self._length_s()
        self._say(f"pause {process.name} for {length_s:.2f} s")
        self._cluster.disturb(process, length_s)
        life = process.life
        process.pause()
        self._world.after(length_s, lambda: self._resume(process, life))

    def _resume(self, process: Process, life: int) -> None:
        if process.life == life and process.is_paused:
            self._say(f"{process.name} goes on")
            process.resume()

    def _drain_node(self) -> None:
        node = self._world.rng.choice(self._cluster.nodes)
        if node.process.is_alive and not node.is_leaving:
            node.process.deliver(node.terminate)
            self._restart_when_gone(node)

    def _drain_router(self) -> None:
        router = self._world.rng.choice(self._cluster.routers)
        if router.process.is_alive and not router.shell.is_draining:
            self._say(f"drain {router.process.name}")
            router.process.deliver(router.terminate)
            self._restart_when_gone(router)

    def _restart_next(self, number: int) -> None:
        """One after another is drained and started again, as when a cluster is brought up to date."""
        servers = self._cluster.servers
        if number >= len(servers):
            return
        server = servers[number]
        self._act_on("rolling restart")
        server.process.deliver(server.terminate)
        self._await_restart(number)

    def _await_restart(self, number: int) -> None:
        server = self._cluster.servers[number]
        if server.process.is_alive:
            self._world.after(0.05, lambda: self._await_restart(number))
        else:
            server.start()
            self._world.after(0.7, lambda: self._restart_next(number + 1))

    def _restart_when_gone(self, owner: SimNode | SimRouter) -> None:
        if not owner.process.is_alive:
            owner.start()
        elif self._world.now_s < FAULTS_END_S:
            self._world.after(0.4, lambda: self._restart_when_gone(owner))

    def _reset_kv_link(self) -> None:
        links = self._network.recorded
        if links:
            end = self._world.rng.choice(links)
            self._say(f"reset the KV link {end.label}")
            end.reset("reset")

    def _slow_engine(self) -> None:
        node = self._world.rng.choice(self._cluster.nodes)
        if not node.process.is_alive:
            return
        slowness, length_s = self._world.rng.choice((5.0, 40.0)), self._length_s()
        self._say(f"{node.name} takes {slowness:g} times as long for {length_s:.2f} s")
        # A step of the slowest kind is under way for this long after it.
        self._cluster.disturb(node.process, length_s + 8.0)
        node.slow_down(slowness)
        life = node.process.life
        self._world.after(length_s, lambda: self._speed_up(node, life))

    def _speed_up(self, node: SimNode, life: int) -> None:
        if node.process.life == life:
            node.slow_down(1.0)

    # ---- the network -------------------------------------------------------------------------------

    def _cut(self) -> None:
        rng, processes = self._world.rng, self._cluster.processes
        one = rng.choice(processes)
        others = [other for other in processes if other is not one]
        if rng.random() < 0.7:
            others = [rng.choice(others)]
        length_s, one_way = self._length_s(), rng.random() < 0.3
        how = "one way" if one_way else "both ways"
        names = " ".join(other.name for other in others)
        self._say(f"cut {one.name} from {names} for {length_s:.2f} s, {how}")
        for other in others:
            self._network.cut(one.name, other.name, one_way=one_way)
            self._cluster.disturb(other, length_s + 1.0)
        self._cluster.disturb(one, length_s + 1.0)
        self._world.after(length_s, self._network.heal)

    def _reset_stream(self) -> None:
        process = self._world.rng.choice(self._cluster.processes)
        ends = self._network.ends_of(process)
        if ends:
            end = self._world.rng.choice(ends)
            self._say(f"reset the stream {end.label}")
            end.reset("reset")

    def _slow_network(self) -> None:
        process, length_s = self._world.rng.choice(self._cluster.processes), self._length_s()
        slowness = self._world.rng.choice((10.0, 100.0))
        self._say(f"messages of {process.name} take {slowness:g} times as long for {length_s:.2f} s")
        self._network.slowness[process.name] = slowness
        for other in self._cluster.processes:
            self._cluster.disturb(other, length_s + 3.0)
        self._world.after(length_s, self._network.slowness.clear)

    def _duplicate(self) -> None:
        length_s = self._length_s()
        self._say(f"commands and reports may come twice for {length_s:.2f} s")
        self._network.duplicate_rate = 0.05
        for process in self._cluster.processes:
            self._cluster.disturb(process, length_s + 2.0)
        self._world.after(length_s, lambda: setattr(self._network, "duplicate_rate", 0.0))

    def _corrupt_kv(self) -> None:
        length_s = self._length_s()
        self._say(f"KV may be corrupted on the wire for {length_s:.2f} s")
        faults = self._cluster.fabric.faults
        faults.corrupt_rate = self._world.rng.choice((0.02, 0.3))
        self._world.after(length_s, lambda: setattr(faults, "corrupt_rate", 0.0))

    def _drop_sessions(self) -> None:
        client = self._world.rng.choice(self._cluster.clients)
        self._say(f"{client.process.name} loses its sessions")
        client.process.deliver(client.lose_sessions)

    # ---- late frames of dead transfers -------------------------------------------------------------

    def _late_kv_frames(self) -> None:
        """Frames of transfers that are over come once more, over whatever link there is now."""
        rng = self._world.rng
        for end in list(self._network.recorded):
            if not end.is_open or rng.random() < 0.3:
                continue
            for frame in self._dead_frames(end):
                if rng.random() < 0.5:
                    self._say(f"once more over {end.label}: {type(frame).__name__}")
                    end.send(frame_bytes(frame))

    def _dead_frames(self, end: End) -> list[Frame]:
        """What was said over links of these two processes about transfers that neither knows any more."""
        live: set[TransferId] = set()
        for node in self._cluster.nodes:
            if node.process.is_alive:
                live |= node.core.states().keys() | node.transfers.open_ids
        names = (end.process.name, end.peer.process.name)
        found = []
        for data in self._network.record_of(*names):
            try:
                frames = FrameReader().feed(data)
            except KVRelayError:
                continue
            found += [frame for frame in frames if getattr(frame, "transfer_id", None) not in (None, *live)]
        return found[-8:]
