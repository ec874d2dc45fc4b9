"""`finish` in a `Session`: a client that met its stop string ends its request well, and early."""

import logging

import pytest

from kvrelay.core.node_messages import ReleaseKV
from kvrelay.core.request import FinishReason


def outcomes(router):
    """Ended requests by outcome, as the metrics count them."""
    lines = router.server.shell.metrics.exposition().decode().splitlines()
    counted = [line.rpartition(" ") for line in lines if line.startswith("kvrelay_requests_total{")]
    return {name.split('"')[1]: float(number) for name, _, number in counted if float(number)}


@pytest.mark.parametrize("stage", ["prefill", "handoff", "decode"])
async def test_it_frees_the_kv_and_counts_as_finished(
    router, pair, cluster, open_session, call, caplog, stage
):
    cluster.stop_before = stage
    session = open_session(router)
    with caplog.at_level(logging.INFO, "kvrelay.router"):
        await session.ask((1, call(request_id="r")))
        if stage != "prefill":
            await session.until_tokens(1, 1)
        await pair[1].next_command(object)
        await session.ask(finish=(1,))
        await session.until_ended(1)
    assert session.finished[1].finish_reason is FinishReason.STOP
    assert session.finished[1].report.num_output_tokens == len(session.tokens.get(1, ()))
    assert session.finished[1].report.decode_node == "d0"
    await pair[1].next_command(ReleaseKV)
    await router.until_settled()
    assert not pair[0].held
    assert not pair[1].held
    counters = router.server.shell.status().counters
    assert (counters.num_finished, counters.num_failed, counters.num_abandoned) == (1, 0, 0)
    assert outcomes(router) == {"stop": 1.0}
    assert any("request=r finished reason=stop" in record.getMessage() for record in caplog.records)


async def test_others_of_the_session_go_on_and_the_stream_id_may_come_again(
    router, pair, cluster, open_session, call, output
):
    cluster.stop_before = "decode"
    session = open_session(router)
    await session.ask((1, call()), (2, call((9,), 5)))
    await session.until_tokens(1, 1)
    await session.ask(finish=(1, 1, 77))
    await session.until_ended(1)
    cluster.resume()
    await session.until_ended(2)
    assert session.tokens[2] == output((9,), 5)
    await session.ask((3, call((4,), 3)), finish=(2,))
    await session.until_ended(3)
    assert session.tokens[3] == output((4,), 3)
    assert not session.failed
    await router.until_settled()


async def test_one_message_may_bring_a_call_and_its_end(router, pair, cluster, open_session, call):
    cluster.stop_before = "prefill"
    session = open_session(router)
    await session.ask((1, call()), finish=(1,))
    await session.until_ended(1)
    assert session.finished[1].finish_reason is FinishReason.STOP
    await router.until_settled()
    assert not pair[0].held
    assert not pair[1].held


async def test_a_call_that_still_waits_for_nodes_may_end_too(router, pair, open_session, call):
    await pair[1].die()
    await router.until(lambda: len(router.server.shell.status().nodes) == 1)
    session = open_session(router)
    await session.ask((1, call()))
    await router.until(lambda: router.server.shell.status().num_requests_by_state["queued"] == 1)
    await session.ask(finish=(1,))
    await session.until_ended(1)
    assert session.finished[1].report.num_output_tokens == 0
    await router.until_settled()
