"""A router that has just started, while its nodes are still on their way: it sends clients elsewhere."""

from __future__ import annotations

import grpc
import pytest

from kvrelay.codec.client_api import decode_models
from kvrelay.codec.errors import from_rpc_error
from kvrelay.core.errors import RouterUnavailable, UnknownModel
from kvrelay.core.node_messages import Role
from kvrelay.v1 import router_pb2

LONG_S = 600.0


@pytest.mark.parametrize("model", ["", "not-attached-yet"])
async def test_a_model_that_may_be_about_to_attach_is_not_called_unknown(
    make_router, open_session, call, model
):
    router = await make_router(attach_wait_s=LONG_S)
    session = open_session(router)
    await session.ask((1, call(model=model)))
    await session.until_ended(1)
    assert isinstance(session.failed[1], RouterUnavailable)
    assert session.failed[1].retryable


async def test_models_that_are_attached_are_served_at_once_beside_others(
    make_router, cluster, open_session, call
):
    router = await make_router(attach_wait_s=LONG_S)
    await cluster.add(router.address, "p0", Role.PREFILL)
    await cluster.add(router.address, "d0", Role.DECODE)
    session = open_session(router)
    await session.ask((1, call()), (2, call(model="not-attached-yet")))
    await session.until_ended(1)
    await session.until_ended(2)
    assert 1 in session.finished
    assert isinstance(session.failed[2], RouterUnavailable)


async def test_an_empty_list_of_models_is_withheld_until_it_can_be_trusted(make_router):
    young, old = await make_router(attach_wait_s=LONG_S), await make_router()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await young.stub.ListModels(router_pb2.ListModelsRequest())
    assert isinstance(from_rpc_error(caught.value), RouterUnavailable)
    assert decode_models(await old.stub.ListModels(router_pb2.ListModelsRequest())) == ()


async def test_later_an_unknown_model_is_the_callers_fault(make_router, cluster, open_session, call):
    router = await make_router()
    await cluster.add(router.address, "p0", Role.PREFILL)
    session = open_session(router)
    await session.ask((1, call(model="nope")))
    await session.until_ended(1)
    assert isinstance(session.failed[1], UnknownModel)
