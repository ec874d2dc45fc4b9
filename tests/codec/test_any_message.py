"""Any well-formed message, whatever its fields hold, decodes or is refused by its field."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.core.errors import InvalidRequest
from tests.any_message import any_message

from .test_codec_round_trip import DECODERS


@pytest.mark.parametrize("name", DECODERS)
@given(rng=st.builds(Random, st.integers(0, 2**32)))
@settings(max_examples=150, deadline=None)
def test_any_well_formed_message_decodes_or_names_the_field_at_fault(name: str, rng: Random) -> None:
    decode, kind = DECODERS[name]
    refused_field = "nothing was refused"
    try:
        decode(any_message(kind, rng))
    except InvalidRequest as refusal:
        refused_field = refusal.field or ""
    assert refused_field, "a refusal names its field"
