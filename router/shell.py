"""The router's shell: owns the core and performs its effects. Everything happens on one event loop.

The gRPC services translate calls into the methods here; the core decides; what it answers goes into the
outboxes of sessions and nodes, whose writers are the services' own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from kvrelay.core.client_types import CallAccepted, CallFinished, GenerateCall
from kvrelay.core.clock import Clock
from kvrelay.core.errors import (
    DuplicateRequest,
    InvalidRequest,
    KVRelayError,
    NodeUnavailable,
    Overloaded,
    RouterUnavailable,
    UnknownRequest,
)
from kvrelay.core.explanation import Explanation
from kvrelay.core.ids import RequestId
from kvrelay.core.node_messages import NodeDescription, NodeFrame
from kvrelay.core.tokenizer_chunk import TokenizerChunk
from kvrelay.router.attachments import Attachment, Attachments
from kvrelay.router.call_admission import CallAdmission
from kvrelay.router.core import RouterCore
from kvrelay.router.events import (
    DeliverFailed,
    DeliverFinished,
    DeliverTokens,
    Event,
    LookDue,
    NodeAttached,
    NodeLost,
    NodeReported,
    RequestCancelled,
    RequestSatisfied,
    SendCommand,
    SessionClosed,
    Ticked,
)
from kvrelay.router.look_timer import LookTimer
from kvrelay.router.metrics import RouterMetrics
from kvrelay.router.server_config import RouterConfig
from kvrelay.router.sessions import ClientSession, Sessions
from kvrelay.router.tokenizer_store import TokenizerStore
from kvrelay.router.views import ClusterStatus

logger = logging.getLogger(__name__)

OFTEN_TICK_S: Final = 0.05
RARE_TICK_S: Final = 0.2


class RouterShell:
    """See the module's text. `bug` is done when the core has failed an assertion: the process must end."""

    def __init__(self, config: RouterConfig, core: RouterCore, clock: Clock, metrics: RouterMetrics) -> None:
        self.config = config
        self.clock = clock
        self.metrics = metrics
        self.tokenizers = TokenizerStore(config.max_tokenizers)
        self.attachments = Attachments(
            config.max_nodes,
            config.max_buffered_commands_per_node,
            config.core.heartbeat_s,
            config.core.node_silence_s,
        )
        self.sessions = Sessions(
            config.max_sessions,
            config.max_buffered_tokens_per_session,
            config.max_buffered_answers_per_session,
        )
        self.bug: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self.is_draining = False
        self.started_s = clock.now_s()
        self._core = core
        self._admission = CallAdmission(config, self.sessions)
        self._events: deque[Event] = deque()
        self._is_dispatching = False
        self._looks = LookTimer(self._look_again)
        self._performers: dict[type, Callable[[Any], None]] = {
            DeliverTokens: self._deliver_tokens,
            SendCommand: self._send_command,
            DeliverFinished: self._deliver_finished,
            DeliverFailed: self._deliver_failed,
        }

    @property
    def router_epoch(self) -> int:
        return self._core.router_epoch

    def status(self) -> ClusterStatus:
        """The core's books, now."""
        return self._core.status(self.clock.now_s())

    def explain(self, request_id: str) -> Explanation:
        """The latest placement of a request, and what was measured of it.

        Raises:
            UnknownRequest: it is not remembered, or has not been placed yet.
        """
        return self._core.explain(RequestId(request_id), self.clock.now_s())

    def dispatch(self, event: Event) -> None:
        """Have the core handle an event, and perform what it answers. Events that this raises are handled
        after it, in order."""
        self._events.append(event)
        if self._is_dispatching:
            return
        self._is_dispatching = True
        try:
            while self._events:
                for effect in self._core.handle(self._events.popleft(), self.clock.now_s()):
                    self._performers[type(effect)](effect)
        except Exception as bug:
            if not self.bug.done():
                self.bug.set_result(bug)
            raise
        finally:
            self._is_dispatching = False
        self._looks.ask(self._core.look_again_s, self.clock.now_s())

    def _look_again(self) -> None:
        if not self.bug.done():
            self.dispatch(LookDue())

    # ---- client streams -----------------------------------------------------------------------------

    def open_session(self, peer: str) -> ClientSession:
        """A new client stream.

        Raises:
            Overloaded: too many are open.
            RouterUnavailable: this router is shutting down.
        """
        self._refuse_when_draining()
        return self.sessions.open(peer)

    def close_session(self, session: ClientSession) -> None:
        """The client stream has ended: its requests are cancelled at once."""
        if session.streams:
            logger.info(
                "session=%d closed peer=%s cancelled=%d",
                session.session_id,
                session.peer,
                len(session.streams),
            )
            self.dispatch(SessionClosed(session.session_id))
        self.sessions.remove(session)

    def submit(self, session: ClientSession, stream_id: int, call: GenerateCall | KVRelayError) -> None:
        """Take a call; whatever is wrong with it comes back on its own stream."""
        try:
            self._submit(session, stream_id, call)
        except KVRelayError as error:
            self.metrics.count_request(error.code)
            session.outbox.put_failed(stream_id, error)

    def _submit(self, session: ClientSession, stream_id: int, call: GenerateCall | KVRelayError) -> None:
        if stream_id in session.streams:
            # One word ends both: a client could not tell which of the two a failure is about.
            self._withdraw(session, stream_id)
            raise DuplicateRequest(f"stream_id {stream_id} is in use in this session", field="stream_id")
        if isinstance(call, KVRelayError):
            raise call
        self._refuse_when_draining()
        models = self.attachments.models() if not call.model or self.may_be_blind else []
        if self.may_be_blind and (call.model not in models if call.model else not models):
            raise self.blind(call.model)
        event = self._admission.admit(session, stream_id, call, models, self.clock.now_s())
        self.sessions.add_request(session, stream_id, event.request_id)
        seed = event.request.sampling.seed if not event.request.sampling.is_greedy else None
        session.outbox.put_accepted(stream_id, CallAccepted(event.request_id, seed))
        logger.debug("request=%s session=%d submitted", event.request_id, session.session_id)
        self.dispatch(event)

    def cancel_stream(self, session: ClientSession, stream_id: int) -> None:
        """Cancel one request of the session; no-op if it has ended."""
        request_id = session.streams.get(stream_id)
        if request_id is not None:
            self.dispatch(RequestCancelled(request_id))

    def finish_stream(self, session: ClientSession, stream_id: int) -> None:
        """The client has all it wants of one request; no-op if it has ended."""
        request_id = session.streams.get(stream_id)
        if request_id is not None:
            self.dispatch(RequestSatisfied(request_id))

    def cancel_request(self, request_id: str) -> None:
        """Cancel a request of any session.

        Raises:
            UnknownRequest: none that lives has this id.
        """
        if request_id not in self.sessions.session_of:
            raise UnknownRequest(f"no live request has the id {request_id!r}", field="request_id")
        self.dispatch(RequestCancelled(RequestId(request_id)))

    def _withdraw(self, session: ClientSession, stream_id: int) -> None:
        """Cancel a request without a word to its client."""
        request_id = session.streams[stream_id]
        self.sessions.end_request(session.session_id, stream_id)
        self.dispatch(RequestCancelled(request_id))

    @property
    def may_be_blind(self) -> bool:
        """Whether this router has started just now: what it does not know may be about to attach."""
        return self.clock.now_s() - self.started_s < self.config.attach_wait_s

    def blind(self, model: str) -> RouterUnavailable:
        """The error for who asks what only attached nodes could tell."""
        what = f"model {model!r}" if model else "any model"
        return RouterUnavailable(
            f"this router has just started, and no node that serves {what} is attached yet"
        )

    def _refuse_when_draining(self) -> None:
        if self.is_draining:
            raise RouterUnavailable("this router is shutting down")

    def abandon_sessions(self) -> None:
        """End every client stream; what is unfinished may be continued through another router."""
        for session in list(self.sessions.by_id.values()):
            stream_ids = self.sessions.forget_streams(session)
            for stream_id in stream_ids:
                session.outbox.put_failed(stream_id, RouterUnavailable("this router is shutting down"))
            if stream_ids:
                self.dispatch(SessionClosed(session.session_id))
            session.outbox.close()

    # ---- nodes --------------------------------------------------------------------------------------

    def attach(self, description: NodeDescription) -> Attachment:
        """A node said hello.

        Raises:
            Overloaded: too many nodes are attached.
        """
        attachment = self.attachments.add(description, self.clock.now_s())
        attachment.tokenizer = self.tokenizers.begin(description.tokenizer_digest)
        logger.info(
            "node=%s attached role=%s model=%s engine=%s host=%s pid=%d incarnation=%016x",
            description.node_id,
            description.role,
            description.model,
            description.engine,
            description.host,
            description.pid,
            description.incarnation,
        )
        self.dispatch(NodeAttached(description))
        return attachment

    def detach(self, attachment: Attachment, reason: str) -> None:
        """A node's stream has ended; the node counts as lost unless it speaks on a newer one."""
        if attachment.tokenizer is not None:
            attachment.tokenizer = None
            self.tokenizers.abandon(attachment.description.tokenizer_digest)
        if not self.attachments.remove(attachment):
            return
        logger.info("node=%s lost reason=%s", attachment.node_id, reason)
        self.dispatch(NodeLost(attachment.node_id, attachment.description.incarnation, reason))

    def hear(self, attachment: Attachment, frame: NodeFrame) -> None:
        """One frame of a node.

        Raises:
            InvalidRequest: its tokenizer chunk is not the one expected.
        """
        attachment.last_heard_s = self.clock.now_s()
        self.metrics.num_node_frames += 1
        if frame.tokenizer is not None:
            self._hear_tokenizer(attachment, frame.tokenizer)
        if not (frame.tokens or frame.reports or frame.load or frame.kv):
            return
        if self.attachments.is_current(attachment):
            self.dispatch(NodeReported(attachment.node_id, frame.tokens, frame.reports, frame.load, frame.kv))

    def _hear_tokenizer(self, attachment: Attachment, chunk: TokenizerChunk) -> None:
        if attachment.tokenizer is None:
            raise InvalidRequest("tokenizer was not asked for", field="tokenizer")
        bundle = attachment.tokenizer.add(chunk)
        if bundle is not None:
            attachment.tokenizer = None
            self.tokenizers.put(chunk.digest, bundle)

    # ---- time ---------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Let time pass: deadlines, heartbeats, nodes that fell silent."""
        for attachment in self.attachments.tick(self.clock.now_s()):
            attachment.end(NodeUnavailable(f"silent for {self.config.core.node_silence_s:g} s"))
        self.dispatch(Ticked())

    async def run_ticker(self) -> None:
        """Tick until cancelled: often while time decides something for a request, rarely otherwise."""
        while True:
            self.tick()
            now_s = self.clock.now_s()
            pause_s = self._core.next_tick_s(now_s) - now_s
            await asyncio.sleep(min(RARE_TICK_S, max(OFTEN_TICK_S, pause_s)))

    # ---- effects ------------------------------------------------------------------------------------

    def _deliver_tokens(self, effect: DeliverTokens) -> None:
        session = self.sessions.by_id.get(effect.session)
        if session is not None and not session.outbox.put_tokens(effect):
            self._cut_off(session)

    def _cut_off(self, session: ClientSession) -> None:
        """The client reads too slowly: its requests end here, others are not held up."""
        limit = self.config.max_buffered_tokens_per_session
        error = Overloaded(
            f"the client reads too slowly: max_buffered_tokens_per_session ({limit}) tokens wait for it"
        )
        session.outbox.fail_slow_streams(self.sessions.forget_streams(session), error)
        logger.warning(
            "session=%d cut off peer=%s reason=slow_reader limit_tokens=%d",
            session.session_id,
            session.peer,
            limit,
        )
        self.dispatch(SessionClosed(session.session_id))

    def _send_command(self, effect: SendCommand) -> None:
        attachment = self.attachments.by_node.get(effect.node_id)
        if attachment is not None and not attachment.outbox.put(effect.command):
            limit = self.config.max_buffered_commands_per_node
            attachment.end(Overloaded(f"the node does not read: {limit} commands wait for it"))

    def _deliver_finished(self, effect: DeliverFinished) -> None:
        report = effect.report
        self.metrics.count_finished(effect.finish_reason.value, report)
        logger.info(
            "request=%s finished reason=%s tokens=%d ttft_s=%.4f total_s=%.4f prefill=%s decode=%s"
            " attempts=%d",
            effect.request_id,
            effect.finish_reason,
            report.num_output_tokens,
            report.ttft_s,
            report.total_s,
            report.prefill_node,
            report.decode_node,
            report.num_attempts,
        )
        session = self._end_stream(effect)
        if session is not None:
            session.outbox.put_finished(effect.stream_id, CallFinished(effect.finish_reason, report))

    def _deliver_failed(self, effect: DeliverFailed) -> None:
        self.metrics.count_request(effect.error.code)
        logger.info(
            "request=%s failed code=%s error=%r", effect.request_id, effect.error.code, effect.error.message
        )
        session = self._end_stream(effect)
        if session is not None:
            session.outbox.put_failed(effect.stream_id, effect.error)

    def _end_stream(self, effect: DeliverFinished | DeliverFailed) -> ClientSession | None:
        """The session that is to hear of a request's end; None: its stream has been given another end."""
        session = self.sessions.by_id.get(effect.session)
        if session is None or session.streams.get(effect.stream_id) != effect.request_id:
            return None
        return self.sessions.end_request(effect.session, effect.stream_id)
