"""What the shell settles about a call before the core sees it: names, the model, the seed, the deadline."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import replace

from kvrelay.core.client_types import GenerateCall
from kvrelay.core.errors import DuplicateRequest, InvalidRequest, NodeUnavailable, Overloaded
from kvrelay.core.ids import RequestId
from kvrelay.core.request import TokenRequest
from kvrelay.core.sampling import MAX_SEED
from kvrelay.router.events import RequestSubmitted
from kvrelay.router.server_config import RouterConfig
from kvrelay.router.sessions import ClientSession, Sessions


class CallAdmission:
    """Turns calls into the core's events."""

    def __init__(self, config: RouterConfig, sessions: Sessions) -> None:
        self._config = config
        self._sessions = sessions
        # Seeds must not be guessable from one another; the client is told its own.
        self._rng = random.SystemRandom()

    def admit(
        self,
        session: ClientSession,
        stream_id: int,
        call: GenerateCall,
        served_models: Sequence[str],
        now_s: float,
    ) -> RequestSubmitted:
        """The event for one call. `served_models` matters only to a call that names none.

        Raises:
            DuplicateRequest, InvalidRequest, NodeUnavailable, Overloaded
        """
        limit = self._config.max_streams_per_session
        if len(session.streams) >= limit:
            raise Overloaded(
                f"max_streams_per_session ({limit}) requests of this session are live", retry_after_s=1.0
            )
        if call.request_id in self._sessions.session_of:
            raise DuplicateRequest(f"request_id {call.request_id!r} is in use", field="request_id")
        limit_s = self._config.core.max_deadline_s
        if call.timeout_s is not None and call.timeout_s > limit_s:
            raise InvalidRequest(
                f"timeout_s must be at most {limit_s:g}, got {call.timeout_s:g}", field="timeout_s"
            )
        return RequestSubmitted(
            request_id=RequestId(call.request_id or f"r-{uuid.uuid4().hex}"),
            session=session.session_id,
            stream_id=stream_id,
            model=call.model or only_model(served_models),
            request=self._with_seed(call.request),
            deadline_s=now_s + call.timeout_s if call.timeout_s is not None else None,
            terms=call.terms,
        )

    def _with_seed(self, request: TokenRequest) -> TokenRequest:
        sampling = request.sampling
        if sampling.is_greedy or sampling.seed is not None:
            return request
        return replace(request, sampling=replace(sampling, seed=self._rng.randint(0, MAX_SEED)))


def only_model(served_models: Sequence[str]) -> str:
    """The model that is meant by a call which names none.

    Raises:
        NodeUnavailable: nothing is served yet.
        InvalidRequest: there is a choice.
    """
    if not served_models:
        raise NodeUnavailable("no node is attached yet", retry_after_s=1.0)
    if len(served_models) > 1:
        raise InvalidRequest(f"model must be given, one of: {', '.join(served_models)}", field="model")
    return served_models[0]
