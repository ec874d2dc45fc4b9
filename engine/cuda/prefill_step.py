"""A prefill step that is queued on the device: who hears of its layers, and when the next may be queued.

The engine's thread queues a step's kernels with a mark behind each layer's KV, and reports a layer when the
device has passed its mark. Reported when they are queued, layers would be gathered up to a whole forward pass
too early, and the transfer thread would wait for the device instead of serving its other transfers. While a
step is queued that the device waits for, nothing is reported of it: the transfer thread would take the
interpreter from this one, and the device run dry. While a step is queued that has to wait for one before it,
that one's layers are reported between its layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from kvrelay.engine.cuda.copy_stream import Mark
from kvrelay.engine.executor import DrawFailed, DrawnToken, LayerDone
from kvrelay.engine.sequence import Chunk

Results = Sequence[DrawnToken | DrawFailed]


class PrefillStep:
    """See `kvrelay.engine.executor.Launched`. `layer_queued` for each layer, then `queued`; the rest comes
    after.

    `mark` gives the point that the device's queue has reached; `read_clock` seconds.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        layer_done: LayerDone | None,
        mark: Callable[[], Mark],
        read_clock: Callable[[], float],
    ) -> None:
        self.chunks = chunks
        self._layer_done = layer_done
        self._mark = mark
        self._read_clock = read_clock
        self._marks: deque[Mark] = deque()
        self._num_reported = 0
        self._began_s = read_clock()
        self._launch_s = 0.0
        self._first_wait: tuple[int, float] | None = None
        self._layer_s = 0.0
        self._done: Mark | None = None
        self._read: Callable[[], Results] | None = None

    def layer_queued(self) -> None:
        """All kernels that write the next layer's KV are queued."""
        self._marks.append(self._mark())

    def queued(self, read: Callable[[], Results] | None) -> None:
        """Everything is queued. `read` gives what is drawn, once the device has done it all."""
        self._done = self._mark()
        self._read = read
        self._launch_s = self._read_clock() - self._began_s

    def has_time(self) -> bool:
        """By how long a layer takes that was waited for, and by how long this step took to launch."""
        return len(self._marks) * self._layer_s > self._launch_s

    def report_passed(self) -> None:
        """Report the layers that the device is done with; waits for none."""
        while self._marks and self._marks[0].query():
            self._report()

    def advance(self) -> bool:
        self.report_passed()
        if self._marks:
            self._marks[0].synchronize()  # without the interpreter lock
            self._note_wait()
            self._report()
        return not self._marks

    def results(self) -> Results:
        assert self._done is not None
        assert not self._marks, "its layers come first"
        self._done.synchronize()
        return () if self._read is None else self._read()

    def _report(self) -> None:
        self._marks.popleft()
        layer = self._num_reported
        self._num_reported += 1
        if self._layer_done is not None:
            self._layer_done(layer)

    def _note_wait(self) -> None:
        """The device passed the mark just now: what lies between two such times is the layers' own."""
        now_s = self._read_clock()
        if self._first_wait is None:
            self._first_wait = (self._num_reported, now_s)
            return
        layer, waited_s = self._first_wait
        self._layer_s = (now_s - waited_s) / (self._num_reported - layer)
