"""Time that requests leave: work in slices, run by the engine's thread between two steps.

While rows run, a slice is begun only if it is known to take less than what is left of the seconds that may pass
between two tokens. How long a slice takes is learned from slices of its kind and size; one that is not known waits
until nobody does. Without requests slices follow one another, and a request that comes waits for one at the most.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

from veneer.training import Slice

REMEMBERED = 8  # of slices of one kind and size, and twice as many of the engine's steps


class Guard:
    """Whether a slice fits between two tokens. between_tokens: seconds that may pass between them."""

    def __init__(self, between_tokens: float = 0.2) -> None:
        self.between_tokens = between_tokens
        self._steps: deque[float] = deque(maxlen=2 * REMEMBERED)
        self._known: dict[tuple[str, int], deque[float]] = {}

    def saw_step(self, seconds: float) -> None:
        self._steps.append(seconds)

    def learn(self, done: Slice, seconds: float) -> None:
        self._known.setdefault(_size(done), deque(maxlen=REMEMBERED)).append(seconds)

    def predicted(self, coming: Slice) -> float:
        """The longest of like slices lately; infinite where none is known. A larger one is taken to be slower."""
        kind, size = _size(coming)
        if (kind, size) in self._known:
            return max(self._known[kind, size])
        known = [s for k, s in self._known if k == kind]
        if not known:
            return math.inf
        nearest = min(known, key=lambda s: abs(s - size))
        return max(self._known[kind, nearest]) * 2.0 ** max(0, size - nearest)

    @property
    def slack(self) -> float:
        """Seconds that the engine's own steps leave between two tokens."""
        return self.between_tokens - max(self._steps, default=0.0)

    def allows(self, coming: Slice) -> bool:
        return self.predicted(coming) < self.slack


def _size(what: Slice) -> tuple[str, int]:
    return what.kind, math.ceil(math.log2(what.tokens)) if what.tokens > 0 else -1


class Spare:
    """One work at a time, which is handed in on any thread and done on the engine's."""

    def __init__(self, guard: Guard, wake: Callable[[], None] = lambda: None) -> None:
        self.guard, self.wake = guard, wake
        self._lock = threading.Lock()
        self._work: Iterator[Slice] | None = None
        self._next: Slice | None = None
        self._done: Future[None] = Future()
        self._stopping = False
        self.slices = 0
        self.seconds = 0.0
        self.put_off = 0  # times that rows had to go first

    def begin(self, work: Iterator[Slice]) -> Future[None]:
        """Start on `work`; the future ends with it, with its error, or (after `stop`) cancelled."""
        with self._lock:
            if self._work is not None:
                raise RuntimeError("another work is under way")
            self._work, self._next, self._stopping = work, None, False
            self._done = Future()
        self.wake()
        return self._done

    def stop(self) -> None:
        """End the work after the slice that runs."""
        self._stopping = True
        self.wake()

    # -- on the engine's thread ------------------------------------------------------------------------------------

    @property
    def wanted(self) -> bool:
        return self._work is not None

    def turn(self, busy: bool, step_seconds: float) -> None:
        """One slice, if there is one and there is time. busy: rows run or wait. step_seconds: of the step before."""
        work = self._work
        if busy:
            self.guard.saw_step(step_seconds)
        if work is None:
            return
        if self._stopping:
            self._end(work, CancelledError())
            return
        coming = self._next
        if busy and coming is not None and not self.guard.allows(coming):
            self.put_off += 1
            return
        began = time.perf_counter()
        try:
            self._next = next(work)
        except StopIteration:
            self._end(work, None)
        except BaseException as error:
            self._end(work, error)
        took = time.perf_counter() - began
        self.slices += 1
        self.seconds += took
        if coming is not None:
            self.guard.learn(coming, took)

    def close(self) -> None:
        """The engine ends: what was under way is stopped where it is."""
        if self._work is not None:
            self._end(self._work, CancelledError())

    def _end(self, work: Any, error: BaseException | None) -> None:
        try:
            work.close()
        except BaseException as other:
            error = error or other
        with self._lock:
            self._work, self._next = None, None
            done = self._done
        if error is None:
            done.set_result(None)
        elif isinstance(error, CancelledError):
            with contextlib.suppress(Exception):
                done.set_exception(error)
        else:
            done.set_exception(error)
