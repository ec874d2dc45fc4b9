"""One short prompt before a node says that it is ready."""

from __future__ import annotations

from typing import Final

from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.interface import Engine, SequenceKey

_NUM_TOKENS: Final = 64
_SALT: Final = b"kvrelay warm-up"
"""No request's, so that none ever finds this prompt's blocks."""


def warm_up(engine: Engine) -> None:
    """Compute a prompt and a token, so that the first request does not pay for what libraries set up at
    their first use. Mutates the engine, and leaves nothing held."""
    info = engine.info
    num_tokens = min(_NUM_TOKENS, info.max_model_len - 2)
    if num_tokens < 1:
        return
    prompt = tuple(index % info.vocab_size for index in range(num_tokens))
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    engine.submit(TokenRequest(prompt, num_tokens, sampling, _SALT), SequenceKey("warm-up"))
    while engine.has_work():
        engine.step()
