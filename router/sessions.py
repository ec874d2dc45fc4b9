"""The client streams and their live requests, both ways round."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvrelay.core.errors import Overloaded
from kvrelay.core.ids import RequestId
from kvrelay.router.events import SessionId
from kvrelay.router.session_outbox import SessionOutbox


@dataclass(slots=True, eq=False)
class ClientSession:
    """One `Session` or `Generate` call. `streams` maps the live ones to their requests."""

    session_id: SessionId
    outbox: SessionOutbox
    peer: str
    streams: dict[int, RequestId] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Sessions:
    """All open sessions, and where each live request's output goes."""

    max_sessions: int
    max_buffered_tokens: int
    max_buffered_answers: int
    by_id: dict[SessionId, ClientSession] = field(default_factory=dict)
    session_of: dict[RequestId, ClientSession] = field(default_factory=dict)
    num_ever: int = 0

    def open(self, peer: str) -> ClientSession:
        """A new session. `peer` is for the log.

        Raises:
            Overloaded: `max_sessions` are open.
        """
        if len(self.by_id) >= self.max_sessions:
            raise Overloaded(f"max_sessions ({self.max_sessions}) client streams are open", retry_after_s=1.0)
        self.num_ever += 1
        outbox = SessionOutbox(self.max_buffered_tokens, self.max_buffered_answers)
        session = ClientSession(SessionId(self.num_ever), outbox, peer)
        self.by_id[session.session_id] = session
        return session

    def remove(self, session: ClientSession) -> None:
        """Forget a session and its requests; no-op if it is gone."""
        self.by_id.pop(session.session_id, None)
        self.forget_streams(session)
        session.outbox.close()

    def forget_streams(self, session: ClientSession) -> list[int]:
        """Forget a session's live requests; returns their stream ids."""
        for request_id in session.streams.values():
            del self.session_of[request_id]
        stream_ids = list(session.streams)
        session.streams.clear()
        return stream_ids

    def add_request(self, session: ClientSession, stream_id: int, request_id: RequestId) -> None:
        session.streams[stream_id] = request_id
        self.session_of[request_id] = session

    def end_request(self, session_id: SessionId, stream_id: int) -> ClientSession | None:
        """Forget one request that has ended; its session, if that is still open."""
        session = self.by_id.get(session_id)
        request_id = session.streams.pop(stream_id, None) if session is not None else None
        if request_id is not None:
            del self.session_of[request_id]
        return session
