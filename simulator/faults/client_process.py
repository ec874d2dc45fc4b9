"""A client: the client library's rotation, retries and continuation, in a shell on virtual time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from kvrelay.client.addresses import RouterRotation
from kvrelay.client.config import ClientConfig
from kvrelay.client.mailbox import AttemptEnd, AttemptFailed
from kvrelay.core.client_types import GenerateCall, SessionAsk, SessionUpdate
from kvrelay.core.errors import RouterUnavailable
from kvrelay.simulator.faults.client_request import ClientRequest
from kvrelay.simulator.faults.network import End, Network
from kvrelay.simulator.faults.process import Process
from kvrelay.simulator.faults.router_process import PING, CancelById
from kvrelay.simulator.faults.world import World


class SimClient:
    """One client of several routers. What `RouterSet` and `Session` do, for `requests` by their names."""

    def __init__(
        self, world: World, network: Network, name: str, addresses: tuple[str, ...], config: ClientConfig
    ) -> None:
        self.process = Process(world, name)
        self.config = config
        self.world = world
        self.requests: dict[str, ClientRequest] = {}
        self.process.start()
        self.rotation = RouterRotation(addresses, world.rng, config.backoff_base_s, config.backoff_max_s)
        self.addresses = addresses
        self._network = network
        self._sessions: dict[str, ClientSession] = {}

    def ask(self, request: ClientRequest) -> None:
        """Begin a request."""
        self.requests[request.name] = request
        request.begin()

    def connect(
        self,
        last: str,
        on_connected: Callable[[ClientSession], None],
        on_failed: Callable[[RouterUnavailable], None],
    ) -> None:
        """A session with a router, of another one than `last` if it can be had."""
        order = self.rotation.order(self.process.now_s(), last=last)
        self._try_next(list(order), on_connected, on_failed)

    def _try_next(
        self,
        left: list[str],
        on_connected: Callable[[ClientSession], None],
        on_failed: Callable[[RouterUnavailable], None],
    ) -> None:
        if not left:
            on_failed(RouterUnavailable("no router answers"))
            return
        address = left.pop(0)
        session = self._sessions.get(address)
        if session is None:
            session = self._sessions[address] = ClientSession(self, address)
            session.dial(self._network)
        session.wait(
            on_connected,
            lambda: self._on_unreachable(address, left, on_connected, on_failed),
        )

    def _on_unreachable(
        self,
        address: str,
        left: list[str],
        on_connected: Callable[[ClientSession], None],
        on_failed: Callable[[RouterUnavailable], None],
    ) -> None:
        self.rotation.mark_failed(address, self.process.now_s())
        self._try_next(left, on_connected, on_failed)

    def cancel_leftover(self, address: str, request_id: str) -> None:
        """See `NamedRequests`: it goes over the session that there is now, as it would over its channel."""
        session = self._sessions.get(address)
        if session is not None:
            session.cancel_by_id(request_id)

    def forget(self, session: ClientSession) -> None:
        """It is over: the address is dialled anew when it is needed."""
        if self._sessions.get(session.address) is session:
            del self._sessions[session.address]

    def lose_sessions(self) -> None:
        """The client drops its connections, as when its program closes one client and opens the next."""
        for session in list(self._sessions.values()):
            session.end("the client closed it")

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)


class ClientSession:
    """One stream with one router, shared by all requests there."""

    def __init__(self, client: SimClient, address: str) -> None:
        self.address = address
        self._client = client
        self._process = client.process
        self._end: End | None = None
        self._is_over = False
        self._waiting: list[tuple[Callable[[ClientSession], None], Callable[[], None]]] = []
        self._calls: dict[int, ClientRequest] = {}
        self._stream_ids = count(1)
        self._heard_s = 0.0

    def dial(self, network: Network) -> None:
        """Connect, within `connect_timeout_s`."""
        network.dial(self._process, self.address, self._on_open, lambda reason: self.end(reason))
        self._process.after(
            self._client.config.connect_timeout_s,
            lambda: None if self._end is not None else self.end("no answer"),
        )

    def wait(self, on_connected: Callable[[ClientSession], None], on_failed: Callable[[], None]) -> None:
        """Be called back when it is connected, or can't be."""
        if self._end is not None:
            on_connected(self)
        else:
            self._waiting.append((on_connected, on_failed))

    def start(self, call: GenerateCall, request: ClientRequest) -> int:
        """Send a call; all it leads to goes to `request`. Returns its stream id."""
        stream_id = next(self._stream_ids)
        self._calls[stream_id] = request
        self._send(SessionAsk(calls=((stream_id, call),)))
        return stream_id

    def cancel(self, stream_id: int) -> None:
        """Tell the router to stop; nothing more comes for that call."""
        if self._calls.pop(stream_id, None) is not None:
            self._send(SessionAsk(cancel=(stream_id,)))

    def finish(self, stream_id: int) -> None:
        """Tell the router that the caller has all it wants."""
        if stream_id in self._calls:
            self._send(SessionAsk(finish=(stream_id,)))

    def cancel_by_id(self, request_id: str) -> None:
        """Have the router cancel a request of any session."""
        self._send(CancelById(request_id))

    def end(self, reason: str) -> None:
        """The stream has ended."""
        if self._is_over:
            return
        self._is_over = True
        self._client.forget(self)
        if self._end is not None:
            self._end.close()
        waiting, self._waiting = self._waiting, []
        for _, on_failed in waiting:
            on_failed()
        calls, self._calls = self._calls, {}
        lost = AttemptFailed(RouterUnavailable(f"router {self.address} was lost: {reason}"), lost_router=True)
        for request in calls.values():
            request.on_end(lost)

    def _on_open(self, end: End) -> None:
        if self._is_over:
            end.close()
            return
        self._end = end
        end.on_message = self._on_update
        end.on_lost = self.end
        self._heard_s = self._process.now_s()
        self._keep_alive()
        waiting, self._waiting = self._waiting, []
        for on_connected, _ in waiting:
            on_connected(self)

    def _keep_alive(self) -> None:
        """gRPC's pings: a router that answers none for too long is lost."""
        config = self._client.config
        if self._is_over:
            return
        silent_s = self._process.now_s() - self._heard_s
        if silent_s > config.keepalive_time_s + config.keepalive_timeout_s:
            self.end("keepalive")
            return
        self._send(PING)
        self._process.after(config.keepalive_time_s, self._keep_alive)

    def _send(self, message: SessionAsk | CancelById | str) -> None:
        if self._end is not None:
            self._end.send(message)

    def _on_update(self, update: SessionUpdate | str) -> None:
        self._heard_s = self._process.now_s()
        if isinstance(update, str):
            return
        start = 0
        for stream_id, num_tokens in zip(update.stream_ids, update.counts, strict=True):
            span = slice(start, start + num_tokens)
            start += num_tokens
            if (request := self._calls.get(stream_id)) is not None:
                request.on_tokens(update.token_ids[span], update.logprobs[span])
        for stream_id, finished in update.finished:
            self._tell_end(stream_id, finished)
        for stream_id, error in update.failed:
            self._tell_end(stream_id, AttemptFailed(error))

    def _tell_end(self, stream_id: int, end: AttemptEnd) -> None:
        if (request := self._calls.pop(stream_id, None)) is not None:
            request.on_end(end)
