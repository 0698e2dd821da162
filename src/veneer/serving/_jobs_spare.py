"""Time that requests leave: work in slices, run by the engine's thread between two steps.

While rows run, a slice is begun only if it is known to take less than what is left of the seconds that may pass
between two tokens. How long a slice takes is learned from slices of its kind and size. One that is not known, or was
slow once and fast before, is tried when it has waited for `PATIENCE`: under requests without an end a job would never
begin, or stop for ever after one slow moment. Without requests slices follow one another, and a request that comes
waits for one at the most: where a slice for several runs would be long, one for fewer is taken.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Protocol

from veneer.training import Slice

PATIENCE = 30.0  # seconds
LONGEST = 1.0  # seconds of a slice that could be a smaller one, while nobody asks: someone may
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

    def may_try(self, coming: Slice) -> bool:
        """Whether a slice that is not allowed may fit all the same: nobody knows, or it did lately."""
        kind, size = _size(coming)
        known = [found for (k, s), found in self._known.items() if k == kind and s <= size]
        return self.slack > 0 and (not known or min(map(min, known)) < self.slack)

    @property
    def slack(self) -> float:
        """Seconds that the engine's own steps leave between two tokens."""
        return self.between_tokens - max(self._steps, default=0.0)

    def allows(self, coming: Slice) -> bool:
        return self.predicted(coming) < self.slack


def _size(what: Slice) -> tuple[str, int]:
    return what.kind, math.ceil(math.log2(what.tokens)) if what.tokens > 0 else -1


class Work(Protocol):
    """What is done in spare time, a slice after the other."""

    def coming(self) -> Slice | None:
        """What `do` would do now; None where there is nothing to do."""

    def smaller(self) -> Slice | None:
        """What `do` would do now instead, if it is to take less time; None where it cannot."""

    def do(self) -> None: ...

    def close(self) -> None: ...

    def __len__(self) -> int:
        """0 where there is nothing to do."""


class Spare:
    """Work that is done by the engine's thread where its rows leave time. wake: tells that thread to look."""

    def __init__(self, guard: Guard, work: Work, wake: Callable[[], None] = lambda: None) -> None:
        self.guard, self.work, self.wake = guard, work, wake
        self.slices: Counter[str] = Counter()  # done, by kind
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.recent: deque[tuple[str, float]] = deque(maxlen=1024)
        self.put_off = 0  # times that rows had to go first
        self._waits: float | None = None  # since when nothing was done for the sake of rows

    # -- on the engine's thread ------------------------------------------------------------------------------------

    @property
    def wanted(self) -> bool:
        return len(self.work) > 0

    def turn(self, busy: bool, step_seconds: float) -> None:
        """One slice, if there is one and there is time. busy: rows run or wait. step_seconds: of the step before."""
        if busy:
            self.guard.saw_step(step_seconds)
        coming = self.work.coming() if self.wanted else None
        while coming is not None and not self._fits(coming, busy):
            smaller = self.work.smaller()
            if smaller is None and busy and self._may_wait(coming):
                self.put_off += 1
                return
            if smaller is None:
                break
            coming = smaller
        if coming is None:
            return
        self._waits = None
        began = time.perf_counter()
        self.work.do()
        took = time.perf_counter() - began
        self.slices[coming.kind] += 1
        self.seconds[coming.kind] += took
        self.recent.append((coming.kind, took))
        self.guard.learn(coming, took)

    def _fits(self, coming: Slice, busy: bool) -> bool:
        return self.guard.allows(coming) if busy else self.guard.predicted(coming) <= LONGEST

    def _may_wait(self, coming: Slice) -> bool:
        """Whether a slice that is not known to fit goes on waiting."""
        now = time.monotonic()
        self._waits = now if self._waits is None else self._waits
        return now - self._waits < PATIENCE or not self.guard.may_try(coming)

    def close(self) -> None:
        """The engine ends: what was under way is stopped where it is."""
        self.work.close()
