"""What one seed plays: the cluster's shape and limits, how the network is, and which faults may happen.

Each seed allows some kinds of faults only, so that rare combinations are not drowned in common ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Final

from kvrelay.client.config import ClientConfig
from kvrelay.core.node_messages import Role
from kvrelay.engine.config import EngineConfig, EngineKind
from kvrelay.engine.sim.timing import SimTiming
from kvrelay.kv_transfer.config import KVTransferConfig
from kvrelay.node.config import NodeConfig
from kvrelay.router.config import RouterCoreConfig
from kvrelay.router.server_config import RouterConfig

VOCAB_SIZE: Final = 997
MAX_MODEL_LEN: Final = 160
BLOCK_SIZE: Final = 4
LEASE_S: Final = 4.0
QUARANTINE_S: Final = 1.0

FAULTS_END_S: Final = 10.0
"""From here on nothing breaks any more."""
PROBES_START_S: Final = FAULTS_END_S + LEASE_S + 3.0
"""Requests from here on must succeed."""
LATEST_END_S: Final = 90.0
"""Everything must be at rest by then."""

FAULT_KINDS: Final = (
    "kill_node",
    "kill_router",
    "pause",
    "cut",
    "reset_stream",
    "slow_engine",
    "slow_network",
    "drain_node",
    "drain_router",
    "duplicate",
    "corrupt_kv",
    "reset_kv_link",
    "late_kv_frames",
    "drop_sessions",
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """`is_rolling_restart`: each server in turn is drained and started again, nothing else happens, and no
    request may fail of that. Else `fault_kinds` are drawn from at `num_faults` moments before `FAULTS_END_S`.
    `kv_write_s` is what a message of KV takes at most, beyond the network's delay. `pulls_eagerly`: routers
    order a pull wherever a node holds more of a prompt than the one that is to compute it."""

    num_routers: int
    num_clients: int
    num_requests: int
    num_probes: int
    nodes: tuple[NodeConfig, ...]
    router: RouterConfig
    client: ClientConfig
    mean_delay_s: float
    kv_write_s: float
    late_writes: bool
    fault_kinds: tuple[str, ...]
    num_faults: int
    is_bursty: bool
    is_rolling_restart: bool
    pulls_eagerly: bool
    prompts: tuple[tuple[int, ...], ...] = field(repr=False, default=())


def draw_scenario(rng: Random) -> Scenario:
    """What that generator's seed plays."""
    is_rolling_restart = rng.random() < 0.08
    fewest = 2 if is_rolling_restart else 1
    num_routers = max(fewest, rng.choice((1, 2, 2, 2)))
    routers = tuple(f"r{index}:1" for index in range(num_routers))
    names = [f"p{index}" for index in range(max(fewest, rng.choice((1, 2, 2, 3))))]
    names += [f"d{index}" for index in range(max(fewest, rng.choice((1, 2, 2, 3))))]
    host_tier_share = rng.choice((0.0, 0.0, 0.5))
    return Scenario(
        num_routers=num_routers,
        num_clients=rng.choice((1, 2)),
        num_requests=rng.choice((6, 12, 20, 28)),
        num_probes=rng.choice((2, 4)),
        nodes=tuple(_node(rng, name, routers, host_tier_share) for name in names),
        router=_router(rng),
        client=_client(rng),
        mean_delay_s=rng.choice((0.0002, 0.001, 0.005, 0.02)),
        kv_write_s=rng.choice((0.0, 0.002, 0.02, 0.2)),
        late_writes=rng.random() < 0.5,
        fault_kinds=tuple(rng.sample(FAULT_KINDS, rng.choice((1, 2, 3, 5)))),
        num_faults=0 if is_rolling_restart else rng.choice((0, 4, 8, 16, 24)),
        is_bursty=rng.random() < 0.3,
        is_rolling_restart=is_rolling_restart,
        pulls_eagerly=rng.random() < 0.35,
        prompts=tuple(_tokens(rng, rng.randint(8, 90)) for _ in range(4)),
    )


def _tokens(rng: Random, num_tokens: int) -> tuple[int, ...]:
    return tuple(rng.randrange(1, VOCAB_SIZE) for _ in range(num_tokens))


def _node(rng: Random, name: str, routers: tuple[str, ...], host_tier_share: float) -> NodeConfig:
    num_blocks = rng.choice((40, 56, 80))
    max_num_seqs = rng.choice((2, 4, 8))
    block_bytes = BLOCK_SIZE * 64
    engine = EngineConfig(
        model="sim",
        engine=EngineKind.SIM,
        num_blocks=num_blocks,
        host_kv_bytes=int(num_blocks * host_tier_share) * block_bytes,
        block_size=rng.choice((BLOCK_SIZE, BLOCK_SIZE, 8)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=rng.choice((24, 48, 96)),
        max_model_len=MAX_MODEL_LEN,
        max_waiting=rng.choice((2, 8, 32)),
        layers_per_group=rng.choice((1, 2, 4)),
        itl_promise_ms=rng.choice((None, None, 60.0)),
        sim_vocab_size=VOCAB_SIZE,
        sim_timing=SimTiming(0.02, 2e-4, 0.0, 0.025, 1e-3, 0.0),
    )
    role = Role.PREFILL if name.startswith("p") else Role.DECODE
    return NodeConfig(
        role=role,
        engine=engine,
        routers=routers,
        transfer=_transfer(rng, name),
        node_id=name,
        max_attempts_in_flight=rng.choice((4, 16, 64)),
        drain_timeout_s=rng.choice((0.5, 3.0)),
        connect_timeout_s=2.0,
        pull_timeout_s=rng.choice((0.05, 0.5, 5.0)),
        reconnect_initial_s=0.1,
        reconnect_max_s=1.0,
        max_pending_tokens=1024,
        max_buffered_kv_keys=1024,
        load_interval_s=0.1,
    )


def draw_node(rng: Random, earlier: NodeConfig) -> NodeConfig:
    """A node of the same name and role with other limits."""
    return _node(rng, earlier.node_id, earlier.routers, 0.0)


def _transfer(rng: Random, name: str) -> KVTransferConfig:
    return KVTransferConfig(
        transport="memory",
        listen_host=name,
        slot_bytes=rng.choice((256, 1024, 4096)),
        num_send_slots=rng.choice((1, 2, 4)),
        num_receive_slots=rng.choice((2, 4, 8)),
        slots_per_transfer=rng.choice((1, 2, 4)),
        max_concurrent_transfers=rng.choice((4, 64)),
        max_pending_offers=rng.choice((2, 64)),
        connect_timeout_s=1.5,
        pending_offer_timeout_s=1.0,
        progress_timeout_s=2.0,
        quarantine_s=QUARANTINE_S,
        link_idle_s=4.0,
    )


def _router(rng: Random) -> RouterConfig:
    core = RouterCoreConfig(
        max_queued_requests=rng.choice((4, 64)),
        queue_timeout_s=8.0,
        node_wait_s=rng.choice((3.0, 8.0)),
        default_deadline_s=25.0,
        max_deadline_s=30.0,
        max_attempts=rng.choice((3, 5)),
        max_prefill_requests_per_node=rng.choice((2, 16)),
        max_prefill_tokens_per_node=rng.choice((128, 1024)),
        growth_tokens=rng.choice((4, 16)),
        max_early_tokens=64,
        ack_timeout_s=1.5,
        lease_s=LEASE_S,
        heartbeat_s=1.0,
        node_silence_s=2.5,
        max_retry_after_s=2.0,
        num_remembered_decisions=16,
        max_index_entries=rng.choice((64, 10_000)),
        max_indexed_nodes=8,
    )
    return RouterConfig(
        core=core,
        max_streams_per_session=rng.choice((4, 256, 256)),
        max_buffered_tokens_per_session=rng.choice((24, 4096, 4096)),
        max_buffered_commands_per_node=rng.choice((8, 256)),
        max_nodes=16,
        drain_timeout_s=1.0,
    )


def _client(rng: Random) -> ClientConfig:
    return ClientConfig(
        connect_timeout_s=1.5,
        max_retries=rng.choice((3, 8)),
        backoff_max_s=2.0,
        keepalive_time_s=2.0,
        keepalive_timeout_s=2.0,
    )
