"""What waits and what runs in the engine, and how requests end: with one event that has a finish, whatever happened."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from veneer.bases import fingerprint
from veneer.errors import VeneerError

from ._batch import Batch
from ._prefix import Prefixes
from ._request import Event, Request
from ._residents import Residents, free
from ._row import Row, Sink
from ._schedule import Schedule
from ._words import Words

log = logging.getLogger("veneer.serving")
MOST_POSITIONS = 4096  # of a row, where neither the base nor the user says
Events = list[tuple[Sink, Event]]


class Ends:
    """The tables of requests under one lock, and how a request leaves them."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, slots: int, max_length: int | None, memory_budget: int | None,
        queue_limit: int, weights: Mapping[str, float] | None, patience: float, prefill: int | None,
        prefix_budget: int, same_base: bool,
    ) -> None:  # fmt: skip
        self.model, self.slots = model.eval(), slots
        self.words = Words(tokenizer, model)
        own = self.words.positions
        self.max_length = min(max_length or own or MOST_POSITIONS, own or max_length or MOST_POSITIONS)
        self._news = threading.Condition(threading.RLock())
        self._commands: deque[Callable[[], None]] = deque()
        self._cancelled: set[str] = set()
        self._sinks: dict[str, Sink] = {}  # of all requests that have no finish yet
        self._schedule = Schedule(queue_limit, weights, patience)
        self._residents = Residents(model, memory_budget, self._wake, same_base)
        device = self._residents.host.device
        self._prefixes = Prefixes(fingerprint(model), prefix_budget)
        self._batch = Batch(
            model, slots, self.max_length, prefill or (256 if device.type == "cpu" else 2048), self._prefixes
        )
        self._aside: dict[str, Row] = {}  # rows that made way, by the id of their request
        self._counts: dict[str, Counter[str]] = {}
        self._seconds: deque[tuple[float, int]] = deque(maxlen=1024)
        self._done: deque[float] = deque(maxlen=64)
        self._steps = self._made_way = 0
        self._closing = self._draining = False
        self.spare: Any = None  # a `Spare`: what is done in the time that requests leave
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="veneer-engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._error is None

    # -- waking it ---------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._news:
            self._news.notify_all()

    def _command(self, command: Callable[[], Any]) -> None:
        with self._news:
            self._commands.append(command)
            self._news.notify_all()

    def _check_alive(self) -> None:
        if self._error is not None:
            raise VeneerError(f"the engine has stopped: {self._error}", next_step="start it again")
        if self._closing:
            raise VeneerError("the engine is closed.", next_step="open another one")

    def _rate(self) -> float:
        """Requests a second that were done lately."""
        if len(self._done) < 2:
            return 0.0
        return len(self._done) / max(1e-3, time.monotonic() - self._done[0])

    def _run(self) -> None:
        """The thread's work (see `Loop`)."""
        raise NotImplementedError

    # -- how requests end ------------------------------------------------------------------------------------------

    def _end_failed(self, events: Events) -> None:
        """Requests that wait for an adapter which cannot be used."""
        for request in self._schedule.waiting():
            error = None if request.version is None else self._residents.failure(request.version)
            if error is not None:
                self._schedule.remove(request.id)
                self._end_failed_one(request, error, events)

    def _end_failed_one(self, request: Request, error: Exception, events: Events) -> None:
        aside = self._aside.pop(request.id, None)
        event = Event(request.id, finish="error", error=error, prompt_tokens=len(request.prompt))
        self._end_waiting(
            request, event if aside is None else aside.event(finish="error", error=error), events
        )

    def _finish(self, row: Row, event: Event, events: Events, spoilt: bool = False) -> None:
        request = row.request
        row.ended = True
        self._batch.leave(row, spoilt)
        self._schedule.done(request)
        if request.version is not None:
            self._residents.versions[request.version].running -= 1
            self._residents.end(request.version)
        counts = self._counts.setdefault(request.version or "", Counter())
        counts["requests"] += 1
        counts[event.finish or ""] += 1
        counts["prompt"] += len(request.prompt)
        counts["generated"] += len(row.said)
        counts["cached"] += row.cached
        self._done.append(time.monotonic())
        events.append((self._sinks.pop(request.id), event))

    def _end_waiting(self, request: Request, event: Event, events: Events) -> None:
        if request.version is not None:
            self._residents.end(request.version)
        counts = self._counts.setdefault(request.version or "", Counter())
        counts["requests"] += 1
        counts[event.finish or ""] += 1
        events.append((self._sinks.pop(request.id), event))

    def _end_cancelled(self, events: Events) -> None:
        while self._cancelled:
            request_id = self._cancelled.pop()
            waiting = self._schedule.remove(request_id)
            if waiting is not None:
                aside = self._aside.pop(request_id, None)
                event = Event(request_id, finish="cancelled", prompt_tokens=len(waiting.prompt))
                event = event if aside is None else aside.event(finish="cancelled")
                self._end_waiting(waiting, event, events)
                continue
            for row in self._batch.everybody:
                if row.request.id == request_id:
                    self._finish(row, row.event(finish="cancelled"), events)

    def _ids_of(self, version: str) -> list[str]:
        requests = [*self._schedule.waiting(), *(r.request for r in self._batch.everybody)]
        return [r.id for r in requests if r.version == version]

    def _emit(self, events: Events) -> None:
        """One call for each sink; one that raises hurts nobody else."""
        by_sink: dict[Any, tuple[Sink, list[Event]]] = {}
        for sink, event in events:
            by_sink.setdefault(_same(sink), (sink, []))[1].append(event)
        for sink, own in by_sink.values():
            try:
                sink(own)
            except Exception:
                log.exception("a sink raised")

    def _end(self) -> None:
        """The thread's last act: every request gets its finish, every waiter an answer."""
        events: Events = []
        with self._news:
            self._closing = True
            finish = "error" if self._error is not None else "cancelled"
            error = None
            if self._error is not None:
                error = VeneerError(f"the engine has stopped: {self._error}", next_step="start it again")
            for request_id, sink in self._sinks.items():
                events.append((sink, Event(request_id, finish=finish, error=error)))  # type: ignore[arg-type]
            self._sinks.clear()
            commands, self._commands = list(self._commands), deque()
            for version in self._residents.versions.values():
                version.users = version.running = 0
                version.leaving = True
            try:
                self._residents.sweep()
                free(self.model)
            except Exception:
                log.exception("the base could not be given back")
            self._batch.clear()
            self._news.notify_all()
        for command in commands:
            command()
        self._emit(events)


def _same(sink: Sink) -> Any:
    """Bound methods are made anew at each mention, and are equal."""
    try:
        hash(sink)
        return sink
    except TypeError:
        return id(sink)
