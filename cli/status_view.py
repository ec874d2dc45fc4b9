"""A router's cluster state as text. Pure: values in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Final

from kvrelay.cli.answer_report import format_mapping
from kvrelay.cli.text_table import aligned_lines
from kvrelay.core.cluster_view import ClusterState, ModelInfo, NodeState, QueueState

NODE_COLUMNS: Final = (
    "node",
    "role",
    "model",
    "host:pid",
    "running/waiting",
    "blocks held/cached/free",
    "attempts",
    "transport",
    "state",
)


def node_rows(state: ClusterState) -> list[tuple[str, ...]]:
    """One row per node, prefill nodes first, in the order of `NODE_COLUMNS`."""
    nodes = sorted(state.nodes, key=lambda node: (node.role != "prefill", node.node_id))
    return [_node_row(node) for node in nodes]


def headline(state: ClusterState) -> str:
    """Which router speaks, and for how long it has been up."""
    up_for = format_duration(state.uptime_s)
    return f"router {state.router_id or '?'}, kvrelay {state.version or '?'}, up {up_for}"


def footer_lines(state: ClusterState, models: Sequence[ModelInfo]) -> list[str]:
    """Models, live requests, counters, the block index, and pairs of nodes that are not matched."""
    served = [
        f"{model.name} ({model.num_prefill_nodes} prefill, {model.num_decode_nodes} decode,"
        f" {model.max_model_len} tokens of context)"
        for model in models
    ]
    return [
        f"models    {'; '.join(served) or 'none'}",
        f"requests  {format_mapping(state.num_requests)}",
        f"queue     {'; '.join(_queue_text(queue) for queue in state.queues) or 'not known'}",
        f"counters  {format_mapping(state.counters)}",
        f"index     {_index_text(state)}",
        *(f"mismatch  {mismatch}" for mismatch in state.mismatches),
    ]


def plain_text(state: ClusterState, models: Sequence[ModelInfo]) -> str:
    """All of it as aligned columns."""
    table = aligned_lines([NODE_COLUMNS, *node_rows(state)]) if state.nodes else ["no nodes are attached"]
    return "\n".join([headline(state), "", *table, "", *footer_lines(state, models)])


def state_as_json(state: ClusterState, models: Sequence[ModelInfo]) -> dict[str, object]:
    """All of it, ready for `json.dumps`."""
    raw = asdict(state)
    raw["num_requests"], raw["counters"] = dict(state.num_requests), dict(state.counters)
    raw["queues"] = [{**asdict(queue), "refused": dict(queue.refused)} for queue in state.queues]
    return {**raw, "models": [asdict(model) for model in models]}


def format_duration(seconds: float) -> str:
    """``3 d 4 h``, ``5 min 6 s``, ``7 s``: the two largest units."""
    whole = max(0, int(seconds))
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((index for index, (amount, _) in enumerate(parts) if amount), len(parts) - 1)
    return " ".join(f"{amount} {unit}" for amount, unit in parts[first : first + 2])


def _node_row(node: NodeState) -> tuple[str, ...]:
    load = node.load
    running = f"{load.num_running}/{load.num_waiting}" if load else "?"
    blocks = f"{load.num_held_blocks}/{load.num_cached_blocks}/{load.num_free_blocks}" if load else "?"
    return (
        node.node_id,
        node.role,
        node.model,
        f"{node.host}:{node.pid}",
        running,
        blocks,
        str(node.num_attempts),
        node.transport or "-",
        "draining" if node.draining else "ready",
    )


def _queue_text(queue: QueueState) -> str:
    """``high 2 of at most 1,024, refused 3 full, 1 deadline``."""
    text = f"{queue.priority} {queue.num_queued:,} of at most {queue.max_queued:,}"
    refused = ", ".join(f"{number:,} {reason}" for reason, number in queue.refused.items() if number)
    return f"{text}, refused {refused}" if refused else text


def _index_text(state: ClusterState) -> str:
    """``1,200 of at most 10,000,000 blocks, 0.2 MB, 0 evicted; guessed for p0``."""
    index = state.index
    text = (
        f"{index.num_entries:,} of at most {index.max_entries:,} blocks, {index.num_bytes / 1e6:.1f} MB,"
        f" {index.num_evicted:,} evicted"
    )
    stale = sorted(node.node_id for node in state.nodes if node.index_stale)
    return f"{text}; guessed for {', '.join(stale)}" if stale else text


def counts_of(state: ClusterState) -> Mapping[str, int]:
    """How many nodes of each role are attached."""
    roles = [str(node.role) for node in state.nodes]
    return {role: roles.count(role) for role in ("prefill", "decode")}
