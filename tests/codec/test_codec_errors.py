"""An error arrives as the error that was sent, in a status or in a session."""

import base64
from urllib.parse import quote

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.codec.client_api import decode_failed, encode_failed
from kvrelay.codec.errors import DETAILS_KEY, from_rpc_error, to_grpc_status
from kvrelay.core.errors import InvalidRequest, KVRelayError, Overloaded, RouterUnavailable
from kvrelay.v1 import router_pb2


class FailedCall(grpc.RpcError):
    """A call that ended with this status."""

    def __init__(self, code, message, metadata=()):
        self._parts = (code, message, metadata)

    def code(self):
        return self._parts[0]

    def details(self):
        return self._parts[1]

    def trailing_metadata(self):
        return self._parts[2]


def what_it_says(error):
    return type(error), error.code, error.message, error.field, error.retry_after_s


@given(data=st.data())
@settings(deadline=None)
def test_every_error_survives_a_status(errors_strategy, data):
    error = data.draw(errors_strategy)
    code, rich = to_grpc_status(error)
    call = FailedCall(code, rich.message, ((DETAILS_KEY, rich.SerializeToString()),))
    assert what_it_says(from_rpc_error(call)) == what_it_says(error)


@given(data=st.data())
@settings(deadline=None)
def test_every_error_survives_a_session(errors_strategy, data):
    error = data.draw(errors_strategy)
    pb = router_pb2.Failed.FromString(encode_failed(error).SerializeToString())
    assert what_it_says(decode_failed(pb)) == what_it_says(error)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("x", field="model"), grpc.StatusCode.INVALID_ARGUMENT),
        (Overloaded("x", retry_after_s=1.0), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (KVRelayError("x"), grpc.StatusCode.INTERNAL),
    ],
)
def test_the_status_code_fits_the_error(error, code):
    status, rich = to_grpc_status(error)
    assert status is code
    assert rich.code == code.value[0]


def test_a_status_of_grpc_itself_is_understood_by_its_code():
    error = from_rpc_error(FailedCall(grpc.StatusCode.UNAVAILABLE, "connection refused", None))
    assert isinstance(error, RouterUnavailable)
    assert "connection refused" in error.message
    assert type(from_rpc_error(grpc.RpcError())) is KVRelayError


@given(raw=st.binary(max_size=100))
@settings(deadline=None)
def test_damaged_details_fall_back_to_the_status_code(raw):
    error = from_rpc_error(FailedCall(grpc.StatusCode.INVALID_ARGUMENT, "no", ((DETAILS_KEY, raw),)))
    assert isinstance(error, KVRelayError)


def test_a_long_message_is_cut_so_that_it_fits_the_trailers():
    _, rich = to_grpc_status(InvalidRequest("\U0001f600" * 100_000, field="é" * 100_000))
    num_details_bytes = len(base64.b64encode(rich.SerializeToString()))
    assert num_details_bytes + len(quote(rich.message)) < 8000
