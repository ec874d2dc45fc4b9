"""KV events: columns of keys pass through."""

from __future__ import annotations

from kvrelay.codec.bounds import length, whole
from kvrelay.core.errors import InvalidRequest
from kvrelay.core.kv_events import MAX_KEYS_PER_EVENT, KVChanges, KVEvent
from kvrelay.v1 import cluster_pb2


def encode_kv_event(event: KVEvent) -> cluster_pb2.KVEvent:
    """All columns."""
    changes = event.changes
    return cluster_pb2.KVEvent(
        first=event.first,
        num_batches=event.num_batches,
        cleared=changes.cleared,
        part=event.part,
        num_parts=event.num_parts,
        stored=changes.stored,
        removed=changes.removed,
        host_stored=changes.host_stored,
        host_removed=changes.host_removed,
    )


def decode_kv_event(pb: cluster_pb2.KVEvent) -> KVEvent:
    """All columns, as lists.

    Raises:
        InvalidRequest: it has too many keys, or its number is out of range.
    """
    if pb.first == 0:
        raise InvalidRequest("kv.first must be at least 1", field="kv.first")
    changes = KVChanges(
        stored=pb.stored[:],
        removed=pb.removed[:],
        host_stored=pb.host_stored[:],
        host_removed=pb.host_removed[:],
        cleared=pb.cleared,
    )
    length(changes.num_keys, "kv", MAX_KEYS_PER_EVENT)
    num_parts = whole(pb.num_parts, "kv.num_parts", 1)
    return KVEvent(
        first=pb.first,
        num_batches=whole(pb.num_batches, "kv.num_batches", 0),
        changes=changes,
        part=whole(pb.part, "kv.part", 0, num_parts - 1),
        num_parts=num_parts,
    )
