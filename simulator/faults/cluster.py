"""The simulated cluster: processes, network, and the requests that its clients make."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from kvrelay.core.client_types import GenerateCall
from kvrelay.core.ids import TransferId
from kvrelay.core.node_messages import Command, ReserveDecode, SendPrefix, StartPrefill
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.simulator.faults.client_process import SimClient
from kvrelay.simulator.faults.client_request import ClientRequest
from kvrelay.simulator.faults.network import Network
from kvrelay.simulator.faults.node_process import SimNode
from kvrelay.simulator.faults.process import Process
from kvrelay.simulator.faults.right_answer import right_answer
from kvrelay.simulator.faults.router_process import SimRouter
from kvrelay.simulator.faults.scenario import (
    FAULTS_END_S,
    MAX_MODEL_LEN,
    PROBES_START_S,
    QUARANTINE_S,
    VOCAB_SIZE,
    Scenario,
)
from kvrelay.simulator.faults.transport import Fabric
from kvrelay.simulator.faults.world import Violation, World


class Cluster:
    """Everything that lives in `world`. `started` is every attempt that a node was ever told to take up."""

    def __init__(self, world: World, scenario: Scenario) -> None:
        self.world = world
        self.scenario = scenario
        self.network = Network(world)
        self.network.mean_delay_s = scenario.mean_delay_s
        self.fabric = Fabric()
        self.fabric.faults.late_writes = scenario.late_writes
        self.fabric.faults.write_s = scenario.kv_write_s
        self.fabric.faults.late_s = 0.9 * QUARANTINE_S
        self.routers = [
            SimRouter(world, self.network, f"r{index}", scenario.router, pulls_eagerly=scenario.pulls_eagerly)
            for index in range(scenario.num_routers)
        ]
        self.nodes = [
            SimNode(world, self.network, self.fabric, config, config.routers) for config in scenario.nodes
        ]
        addresses = tuple(router.client_address for router in self.routers)
        self.clients = [
            SimClient(world, self.network, f"c{index}", addresses, scenario.client)
            for index in range(scenario.num_clients)
        ]
        self.probes: list[ClientRequest] = []
        self.disturbed_s: dict[str, float] = {}
        """By process name: when something was last done to it that may make it answer late."""
        self._started: dict[tuple[TransferId, type[Command]], Command] = {}
        self._num_requests = 0
        self.ask_times_s: list[float] = []
        """When its clients ask, probes aside."""

    @property
    def processes(self) -> list[Process]:
        """All of them."""
        return [
            *(router.process for router in self.routers),
            *(node.process for node in self.nodes),
            *(client.process for client in self.clients),
        ]

    @property
    def servers(self) -> list[SimRouter | SimNode]:
        """What is started, killed and drained."""
        return [*self.routers, *self.nodes]

    @property
    def requests(self) -> list[ClientRequest]:
        """All requests so far."""
        return [request for client in self.clients for request in client.requests.values()]

    def start(self) -> None:
        """Start all processes, and plan all requests."""
        for node in self.nodes:
            node.on_command = self._note_command
        for owner in self.servers:
            self.world.after(self.world.rng.uniform(0.0, 0.3), owner.start)
        rng, scenario = self.world.rng, self.scenario
        burst_s = rng.uniform(1.0, FAULTS_END_S - 2.0)
        for _ in range(scenario.num_requests):
            time_s = rng.gauss(burst_s, 0.05) if scenario.is_bursty else rng.uniform(0.6, FAULTS_END_S - 1.0)
            self.ask_times_s.append(time_s)
            self.world.at(time_s, lambda: self._ask(is_probe=False))
        for index in range(scenario.num_probes):
            self.world.at(PROBES_START_S + 0.8 * index, lambda: self._ask(is_probe=True))

    def _ask(self, *, is_probe: bool) -> None:
        rng = self.world.rng
        client = rng.choice(self.clients)
        self._num_requests += 1
        request = self._make_request(client, rng, f"q{self._num_requests}", is_probe=is_probe)
        if is_probe:
            self.probes.append(request)
        elif rng.random() < 0.12:
            client.process.after(rng.expovariate(2.0), request.cancel)
        elif rng.random() < 0.12:
            request.num_wanted = rng.randint(1, len(request.answer))
        client.process.deliver(lambda: client.ask(request))

    def _make_request(self, client: SimClient, rng: Random, name: str, *, is_probe: bool) -> ClientRequest:
        shared = rng.choice(self.scenario.prompts)
        tail = tuple(rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(0, 24)))
        prompt = (shared[: rng.randint(1, len(shared))] if rng.random() < 0.3 else shared) + tail
        sampling = SamplingParams(
            max_tokens=rng.choice((1, 2, 4, 8, 16, 32, 64)),
            temperature=rng.choice((0.0, 1.0)),
            seed=rng.randrange(2**32),
            num_logprobs=rng.choice((None, None, None, 1)),
        )
        request = TokenRequest(prompt, len(prompt), sampling, rng.choice((b"", b"", b"", b"salt")))
        answer, _ = right_answer(request, VOCAB_SIZE, MAX_MODEL_LEN)
        if rng.random() < 0.2:
            stops = (rng.choice(tuple(answer)),)
            request = replace(request, sampling=replace(sampling, stop_token_ids=stops))
        answer, reason = right_answer(request, VOCAB_SIZE, MAX_MODEL_LEN)
        timeout_s = 20.0 if is_probe else rng.choice((None, 1.0, 6.0, 15.0, 15.0))
        return ClientRequest(client, GenerateCall(name, "sim", request, timeout_s), answer, reason)

    def _note_command(self, node: SimNode, router_epoch: int, command: Command) -> None:
        """No transfer id may ever name two attempts."""
        if not isinstance(command, StartPrefill | ReserveDecode | SendPrefix):
            return
        key = (TransferId(router_epoch, command.attempt), type(command))
        earlier = self._started.setdefault(key, command)
        if earlier is not command:
            raise Violation(f"{node.name} was given the transfer id {key[0]}, which was used before")

    def disturb(self, process: Process, for_s: float = 0.0) -> None:
        """It may answer late from now until so much later."""
        until_s = self.world.now_s + for_s
        self.disturbed_s[process.name] = max(self.disturbed_s.get(process.name, 0.0), until_s)
