"""What a router tells: models, tokenizers, the cluster's state, health, reflection, metrics."""

import asyncio
import contextlib
import http.client
import json
import random

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvrelay.codec.client_api import (
    decode_cluster_state,
    decode_models,
    decode_tokenizer_chunk,
    encode_generate,
    encode_get_tokenizer,
    encode_watch_cluster,
)
from kvrelay.codec.errors import from_rpc_error
from kvrelay.core.kv import KVFingerprint
from kvrelay.core.kv_events import KVChanges, KVEvent
from kvrelay.core.node_messages import NodeFrame, NodeLoad, Role, SendKVSnapshot
from kvrelay.core.tokenizer_chunk import TokenizerAssembly, tokenizer_digest
from kvrelay.v1 import cluster_pb2, router_pb2

BUNDLE = random.Random(1).randbytes(3 << 20)


async def refusal(awaitable):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return from_rpc_error(caught.value)


async def fetch_tokenizer(router, model=""):
    stream = router.stub.GetTokenizer(encode_get_tokenizer(model))
    assembly = TokenizerAssembly(tokenizer_digest(BUNDLE))
    bundle = None
    while (chunk := await stream.read()) is not grpc.aio.EOF:
        bundle = assembly.add(decode_tokenizer_chunk(chunk))
    return bundle


async def test_a_tokenizer_goes_from_a_node_through_the_router_to_a_client(router, cluster):
    digest = tokenizer_digest(BUNDLE)
    first = await cluster.add(router.address, "p0", Role.PREFILL, tokenizer=BUNDLE, tokenizer_digest=digest)
    assert first.welcome.wants_tokenizer
    assert await fetch_tokenizer(router) == BUNDLE
    assert await fetch_tokenizer(router, "m") == BUNDLE
    second = await cluster.add(router.address, "d0", Role.DECODE, tokenizer_digest=digest)
    assert not second.welcome.wants_tokenizer, "the router has it already"


async def test_a_tokenizer_that_does_not_match_its_digest_ends_its_node(router, cluster):
    digest = tokenizer_digest(b"something else")
    node = await cluster.add(router.address, "p0", Role.PREFILL, tokenizer_digest=digest)
    chunk = {"digest": digest, "total_bytes": 4, "data": b"evil"}
    node.send_raw(cluster_pb2.NodeFrame(tokenizer=chunk))
    code, details = await node.end_status()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "tokenizer.digest" in details


async def test_asking_for_a_tokenizer_says_what_is_missing(make_router, cluster):
    router = await make_router(tokenizer_wait_s=0.05)
    assert (await refusal(fetch_tokenizer(router))).code == "NODE_UNAVAILABLE"
    await cluster.add(router.address, "p0", Role.PREFILL)
    assert (await refusal(fetch_tokenizer(router, "nope"))).code == "UNKNOWN_MODEL"
    error = await refusal(fetch_tokenizer(router))
    assert (error.code, error.field) == ("INVALID_REQUEST", "model")
    digest = tokenizer_digest(BUNDLE)
    await cluster.add(router.address, "p1", Role.PREFILL, model="late", tokenizer_digest=digest)
    assert (await refusal(fetch_tokenizer(router, "late"))).code == "NODE_UNAVAILABLE"
    bad = router.stub.GetTokenizer(router_pb2.GetTokenizerRequest(model="x" * 300))
    assert (await refusal(bad.read())).field == "model"


async def test_models_are_listed_with_their_limits_and_nodes(router, pair, cluster):
    await cluster.add(router.address, "d1", Role.DECODE)
    (model,) = decode_models(await router.stub.ListModels(router_pb2.ListModelsRequest()))
    assert model.name == "m"
    assert (model.vocab_size, model.max_model_len, model.eos_token_ids) == (1000, 4096, (0,))
    assert (model.num_prefill_nodes, model.num_decode_nodes) == (1, 2)


async def test_the_cluster_is_watched_now_and_at_every_change(router, pair, cluster):
    stream = router.stub.WatchCluster(encode_watch_cluster(0.1))
    first = decode_cluster_state(await stream.read())
    assert {node.node_id: node.role for node in first.nodes} == {"p0": Role.PREFILL, "d0": Role.DECODE}
    assert first.num_requests["queued"] == 0
    await cluster.add(router.address, "d1", Role.DECODE)
    second = decode_cluster_state(await asyncio.wait_for(stream.read(), 20))
    assert len(second.nodes) == 3
    pair[0].send(NodeFrame(load=NodeLoad(num_waiting=4)))
    third = decode_cluster_state(await asyncio.wait_for(stream.read(), 20))
    assert [node.load.num_waiting for node in third.nodes if node.node_id == "p0"] == [4]
    stream.cancel()


async def test_watching_once_ends_after_one_state(router):
    stream = router.stub.WatchCluster(encode_watch_cluster(once=True))
    decode_cluster_state(await stream.read())
    assert await asyncio.wait_for(stream.read(), 20) is grpc.aio.EOF


async def test_watching_is_bounded_and_its_interval_checked(make_router):
    router = await make_router(max_watchers=1)
    first = router.stub.WatchCluster(encode_watch_cluster(1.0))
    await first.read()
    second = router.stub.WatchCluster(encode_watch_cluster(1.0))
    assert (await refusal(second.read())).code == "OVERLOADED"
    bad = router.stub.WatchCluster(encode_watch_cluster(1e-6))
    assert (await refusal(bad.read())).field == "interval_s"
    first.cancel()


async def test_fingerprints_that_differ_are_shown_with_their_difference(router, cluster):
    await cluster.add(router.address, "p0", Role.PREFILL)
    other = KVFingerprint("m", "bfloat16", 2, 2, 8, "r")
    await cluster.add(router.address, "d0", Role.DECODE, fingerprint=other)
    stream = router.stub.WatchCluster(encode_watch_cluster(once=True))
    (mismatch,) = decode_cluster_state(await stream.read()).mismatches
    assert "p0" in mismatch
    assert "dtype" in mismatch
    assert "bfloat16" in mismatch


async def test_health_is_served_and_turns_when_the_router_stops(router):
    stub = health_pb2_grpc.HealthStub(router.channel)
    request = health_pb2.HealthCheckRequest(service="kvrelay.v1.Router")
    watch = stub.Watch(request)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
    stopping = asyncio.create_task(router.server.stop(0.0))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    await stopping


async def test_reflection_names_both_services(router):
    stub = reflection_pb2_grpc.ServerReflectionStub(router.channel)
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert {"kvrelay.v1.Router", "kvrelay.v1.Cluster", "grpc.health.v1.Health"} <= names
    call.cancel()


async def get(router, path):
    """Status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", router.server.http_port, timeout=20)

    def ask():
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()

    return await asyncio.to_thread(ask)


async def test_http_says_health_readiness_and_state(router, cluster):
    assert (await get(router, "/health"))[0] == 200
    assert (await get(router, "/ready"))[0] == 503
    await cluster.add(router.address, "p0", Role.PREFILL)
    assert (await get(router, "/ready"))[0] == 503
    await cluster.add(router.address, "d0", Role.DECODE)
    assert (await get(router, "/ready"))[0] == 200
    state = json.loads((await get(router, "/status"))[1])
    assert {node["node_id"] for node in state["nodes"]} == {"p0", "d0"}
    assert (await get(router, "/nothing"))[0] == 404


async def test_metrics_count_requests_tokens_and_nodes(router, pair, call):
    stream = router.stub.Generate(encode_generate(call(max_tokens=6)))
    while await stream.read() is not grpc.aio.EOF:
        pass
    refused = router.stub.Generate(encode_generate(call(model="nope")))
    assert await refused.code() is grpc.StatusCode.NOT_FOUND
    lines = set((await get(router, "/metrics"))[1].splitlines())
    assert 'kvrelay_requests_total{outcome="length"} 1.0' in lines
    assert 'kvrelay_requests_total{outcome="unknown_model"} 1.0' in lines
    assert "kvrelay_tokens_total 6.0" in lines
    assert "kvrelay_ttft_seconds_count 1.0" in lines
    assert "kvrelay_tpot_seconds_count 1.0" in lines
    assert "kvrelay_queue_length 0.0" in lines
    assert 'kvrelay_nodes{draining="false",role="prefill"} 1.0' in lines
    assert 'kvrelay_live_requests{state="decoding"} 0.0' in lines


async def test_metrics_and_status_show_the_block_index(router, pair):
    prefill, _ = pair
    prefill.send(NodeFrame(kv=KVEvent(1, 0, KVChanges(stored=[1, 2, 3], cleared=True))))
    prefill.send(NodeFrame(kv=KVEvent(5, 1, KVChanges(stored=[4]))))
    await prefill.next_command(SendKVSnapshot)
    lines = set((await get(router, "/metrics"))[1].splitlines())
    assert "kvrelay_index_entries 3.0" in lines
    assert "kvrelay_index_max_entries 1e+07" in lines
    assert "kvrelay_index_evicted_total 0.0" in lines
    assert "kvrelay_index_events_total 2.0" in lines
    assert "kvrelay_index_gaps_total 1.0" in lines
    assert "kvrelay_index_stale_nodes 2.0" in lines
    state = json.loads((await get(router, "/status"))[1])
    assert state["index"]["num_entries"] == 3
    assert [node["index_stale"] for node in state["nodes"]] == [True, True]
    prefill.send(NodeFrame(kv=KVEvent(6, 0, KVChanges(stored=[1, 4], cleared=True))))
    stream = router.stub.WatchCluster(encode_watch_cluster(interval_s=0.1))
    while (state := decode_cluster_state(await stream.read())).index.num_entries != 2:
        pass
    assert [node.index_stale for node in state.nodes] == [False, True]
    stream.cancel()
