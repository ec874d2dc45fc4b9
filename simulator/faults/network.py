"""The network: ordered streams between processes, each with delays of its own, cut and held up at will.

What is sent on one stream comes in order; streams overtake each other. A process that is killed ends its
streams after what is on its way, or together with it. Between two hosts that can't reach each other nothing
moves: it comes when they can again. A message for a process that has another life by then is answered with
a reset.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

from kvrelay.core.node_messages import RouterFrame
from kvrelay.simulator.faults.process import Process
from kvrelay.simulator.faults.world import World

WINDOW: Final = 16
"""Messages of one direction on their way; who sends more should wait for `has_window`."""
RECORD_LENGTH: Final = 24
_END: Final = object()


class End:
    """One process' end of a stream. `on_message` and `on_lost` are its owner's to set; `on_lost` is called
    once, unless this end closes first. `on_window` is called when there is room for more."""

    def __init__(self, network: Network, process: Process, label: str) -> None:
        self.process = process
        self.label = label
        self.is_open = True
        self.on_message: Callable[[Any], None] = _ignore
        self.on_lost: Callable[[str], None] = _ignore
        self.on_window: Callable[[], None] | None = None
        self.peer: End
        self._network = network
        self._life = process.life
        self._coming: deque[tuple[float, Any]] = deque()
        self._last_s = 0.0
        self._is_arriving = False
        self._is_held = False
        self._num_parked = 0
        self._waits_for_window = False

    @property
    def is_living(self) -> bool:
        """Whether the process that opened it is still the same."""
        return self._life == self.process.life and self.process.is_alive

    @property
    def has_window(self) -> bool:
        """Whether the peer is not too far behind."""
        peer = self.peer
        has_window = len(peer._coming) + peer._num_parked < WINDOW
        self._waits_for_window = not has_window
        return has_window

    def send(self, message: Any) -> None:
        """Nothing happens on a closed end."""
        if not self.is_open:
            return
        if isinstance(message, bytes):
            self._network.record(self, message)
        self.peer._push(message)
        if self._network.may_duplicate(message):
            self.peer._push(message)

    def close(self) -> None:
        """The peer learns of it behind what was sent before."""
        if self.is_open:
            self.is_open = False
            self._network.forget(self)
            self.peer._push(_END)

    def reset(self, reason: str) -> None:
        """Both ends lose it, and what is on its way with it; each learns of it in its own time."""
        for end in (self, self.peer):
            end._coming.clear()
            end._push(_END)

    def abandon(self, *, drops_messages: bool) -> None:
        """Its process is dead: the peer's host hears of it."""
        self.is_open = False
        self._network.forget(self)
        if drops_messages:
            self.peer._coming.clear()
        self.peer._push(_END)

    def vanish(self) -> None:
        """Its process is dead, and nobody is told."""
        self.is_open = False
        self._network.forget(self)

    def resume_coming(self) -> None:
        """The hosts reach each other again."""
        if self._is_held:
            self._is_held = False
            self._arrive_later()

    def _push(self, message: Any) -> None:
        if not self.is_open and self.is_living:
            return
        world = self._network.world
        delay_s = self._network.delay_s(self.peer.process, self.process)
        self._last_s = max(self._last_s, world.now_s + delay_s)
        self._coming.append((self._last_s, message))
        if not self._is_arriving and not self._is_held:
            self._arrive_later()

    def _arrive_later(self) -> None:
        if self._coming:
            self._is_arriving = True
            self._network.world.at(self._coming[0][0], self._arrive)

    def _arrive(self) -> None:
        self._is_arriving = False
        if not self._coming:
            return
        if self._coming[0][0] > self._network.world.now_s:
            self._arrive_later()
        elif self._network.is_cut(self.peer.process, self.process):
            self._is_held = True
            self._network.hold(self)
        else:
            message = self._coming.popleft()[1]
            self._arrive_later()
            self._hand_over(message)

    def _hand_over(self, message: Any) -> None:
        if not self.is_living:
            if message is not _END:
                self.peer._push(_END)
            return
        self._num_parked += 1
        self.process.deliver(lambda: self._take(message))

    def _take(self, message: Any) -> None:
        self._num_parked -= 1
        if not self.is_open:
            return
        if message is _END:
            self.is_open = False
            self._network.forget(self)
            self.on_lost("the stream broke")
            return
        if self.peer._waits_for_window and self.peer.is_living:
            self.peer.process.deliver(self.peer._tell_window)
        self.on_message(message)

    def _tell_window(self) -> None:
        if self.is_open and self.on_window is not None and self.has_window:
            self.on_window()


class Network:
    """All streams. Addresses are ``host:port``; a host has the name of its process."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.mean_delay_s = 0.001
        self.duplicate_rate = 0.0
        self.slowness: dict[str, float] = {}
        """By process name: its messages take so many times as long."""
        self._cuts: set[tuple[str, str]] = set()
        self._ends: dict[End, None] = {}
        self._held: list[End] = []
        self._records: dict[tuple[str, str], deque[bytes]] = {}
        self._listeners: dict[str, tuple[Process, int, Callable[[End], None]]] = {}

    def listen(self, address: str, process: Process, on_connection: Callable[[End], None]) -> None:
        """Take connections until the process dies."""
        self._listeners[address] = (process, process.life, on_connection)

    def unlisten(self, address: str) -> None:
        """Refuse connections from now on."""
        self._listeners.pop(address, None)

    def dial(
        self,
        process: Process,
        address: str,
        on_open: Callable[[End], None],
        on_refused: Callable[[str], None],
    ) -> None:
        """Connect; with hosts that can't be reached nothing happens until they can."""
        life = process.life

        def arrive() -> None:
            if life != process.life:
                return
            listener = self._listeners.get(address)
            if listener is not None and self.is_cut(process, listener[0]):
                self.world.after(0.25, arrive)
            elif listener is None or not (listener[0].is_alive and listener[0].life == listener[1]):
                process.deliver(lambda: on_refused("connection refused"))
            else:
                self._open(process, listener[0], address, on_open, listener[2])

        self.world.after(self._draw_delay_s(), arrive)

    def _open(
        self,
        dialler: Process,
        listener: Process,
        address: str,
        on_open: Callable[[End], None],
        on_connection: Callable[[End], None],
    ) -> None:
        near = End(self, dialler, f"{dialler.name}>{address}")
        far = End(self, listener, f"{address}<{dialler.name}")
        near.peer, far.peer = far, near
        self._ends[near] = self._ends[far] = None
        listener.deliver(lambda: on_connection(far))
        dialler.deliver(lambda: on_open(near))

    # ---- faults ------------------------------------------------------------------------------------

    def cut(self, one: str, other: str, *, one_way: bool = False) -> None:
        """From now on nothing moves from one to the other, nor back, unless it is cut `one_way`."""
        self._cuts.add((one, other))
        if not one_way:
            self._cuts.add((other, one))

    def heal(self) -> None:
        """All hosts reach each other."""
        self._cuts.clear()
        held, self._held = self._held, []
        for end in held:
            end.resume_coming()

    def is_cut(self, sender: Process, receiver: Process) -> bool:
        """Whether nothing moves from one to the other."""
        return bool(self._cuts) and (sender.name, receiver.name) in self._cuts

    @property
    def recorded(self) -> list[End]:
        """The open ends over which bytes were sent."""
        return [end for end in self._ends if (end.process.name, end.peer.process.name) in self._records]

    def record_of(self, sender: str, receiver: str) -> list[bytes]:
        """The latest bytes from one process to another, one item for each `send`."""
        return list(self._records.get((sender, receiver), ()))

    def record(self, end: End, data: bytes) -> None:
        """These were sent."""
        key = (end.process.name, end.peer.process.name)
        self._records.setdefault(key, deque(maxlen=RECORD_LENGTH)).append(data)

    def hold(self, end: End) -> None:
        """Have it go on when the network is whole again."""
        self._held.append(end)

    def forget(self, end: End) -> None:
        """It is closed."""
        self._ends.pop(end, None)

    def ends_of(self, process: Process) -> list[End]:
        """The open ends of that process' present life."""
        return [end for end in self._ends if end.process is process and end.is_living]

    def may_duplicate(self, message: Any) -> bool:
        """Whether this message is to come twice: commands and reports may. Bytes are a TCP stream's, and
        tokens, sessions and greetings rely on their stream by contract."""
        if self.duplicate_rate == 0.0:
            return False
        is_report = isinstance(message, tuple) and message[1] is None
        return (is_report or isinstance(message, RouterFrame)) and self.world.chance(self.duplicate_rate)

    def delay_s(self, sender: Process, receiver: Process) -> float:
        """Of one message."""
        slowness = self.slowness
        delay_s = self._draw_delay_s()
        if slowness:
            delay_s *= max(slowness.get(sender.name, 1.0), slowness.get(receiver.name, 1.0))
        return delay_s

    def _draw_delay_s(self) -> float:
        draw = self.world.rng.random()
        # Mostly near the mean, now and then fifty times as long.
        return self.mean_delay_s * (0.2 + draw if draw < 0.97 else 50.0 * (draw - 0.96))


def _ignore(_message: Any) -> None:
    return
