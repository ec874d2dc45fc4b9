"""`DrainNode`: a router passes the word on to the node that is meant, and to no other."""

import grpc
import pytest

from kvrelay.codec.client_api import encode_drain_node
from kvrelay.codec.errors import from_rpc_error
from kvrelay.core.node_messages import StartDrain


async def test_the_node_that_is_meant_is_told(router, pair):
    prefill, decode = pair
    await router.stub.DrainNode(encode_drain_node("d0"))
    await decode.next_command(StartDrain)
    await router.stub.DrainNode(encode_drain_node("p0"))
    await prefill.next_command(StartDrain)


@pytest.mark.parametrize(
    ("node_id", "code"), [("p9", "UNKNOWN_NODE"), ("", "INVALID_REQUEST"), ("x" * 9999, "INVALID_REQUEST")]
)
async def test_an_id_that_no_node_has_is_refused_by_name(router, pair, node_id, code):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await router.stub.DrainNode(encode_drain_node(node_id))
    error = from_rpc_error(caught.value)
    assert (error.code, error.field) == (code, "node_id")
