"""The engine's loop: what the thread that owns the model does, step after step.

A step is: commands, rows that join, a forward, one token for every row, events: one call of each sink, whatever number
of its requests had news. The lock guards who waits and who runs. No forward, no choice of tokens and no text is made
under it, so that other threads are never held up by the model.
"""

from __future__ import annotations

import time

import torch

from ._batch import Said
from ._ends import Ends, Events, log
from ._request import Event, Request
from ._row import Row
from ._sampling import Chooser, choose
from ._text import Text


class Loop(Ends):
    """The thread that moves rows on. `Engine` is its public side."""

    def _run(self) -> None:
        try:
            while self._wait():
                began = time.perf_counter()
                self._step()
                if self.spare is not None:
                    busy = bool(self._batch.size or self._schedule.length)
                    self.spare.turn(busy, time.perf_counter() - began)
        except BaseException as e:  # the loop itself: nothing that a request can cause comes here
            self._error = e
            log.exception("the engine has stopped")
        finally:
            if self.spare is not None:
                self.spare.close()
            self._end()

    def _wait(self) -> bool:
        """Until there is something to do; False when it is time to end."""
        with self._news:
            while not self._closing:
                if self._commands or self._cancelled or self._batch.size:
                    return True
                if self._schedule.length and self._ready_soon():
                    self._gather()
                    return True
                if self.spare is not None and self.spare.wanted:
                    return True
                for version in self._residents.sweep():
                    self._prefixes.drop(version)
                # The reader wakes this thread; the timeout is for a wait on patience alone.
                self._news.wait(1.0 if self._schedule.length else None)
            return False

    def _gather(self) -> None:
        """Where nothing runs, requests that come together begin together: a moment's wait, small beside a step, for
        rows that would else be a step apart to their end."""
        usual = self._seconds[-1][0] if self._seconds else 0.0
        pause, end = 0.03 * usual, time.monotonic() + 0.1 * usual
        waiting = 0
        while waiting < self._schedule.length < self.slots and time.monotonic() < end and not self._closing:
            waiting = self._schedule.length
            self._news.wait_for(lambda: self._schedule.length > waiting or self._closing, pause)  # noqa: B023

    def _ready_soon(self) -> bool:
        states = {v: s["state"] for v, s in self._residents.stats().items()}
        return any(
            r.version is None or states.get(r.version) != "reading" or self._read(r.version)
            for r in self._schedule.waiting()
        )

    def _read(self, version: str) -> bool:
        reading = self._residents.versions[version].reading
        return reading is None or reading.done()

    def _step(self) -> None:
        began = time.perf_counter()
        events: Events = []
        while self._commands:
            try:
                self._commands.popleft()()
            except Exception:
                log.exception("a command failed")
        with self._news:
            self._end_cancelled(events)
            self._end_failed(events)
        self._admit(events)
        if self._batch.size:
            said, failed = self._batch.step()
            spoken = self._speak(said)
            with self._news:
                for row, event in spoken:
                    self._schedule.charge(row.request, 1)
                    if event.finish is None:
                        events.append((row.sink, event))
                    else:
                        self._finish(row, event, events)
                for row, error in failed:
                    log.warning("request %s failed: %s", row.request.id, error)
                    self._finish(row, row.event(finish="error", error=error), events, spoilt=True)
                self._steps += 1
                self._seconds.append((time.perf_counter() - began, len(said)))
        with self._news:
            for version in self._residents.sweep():
                self._prefixes.drop(version)
            self._news.notify_all()
        self._emit(events)

    def _admit(self, events: Events) -> None:
        """Rows join while there are slots, whoever's turn it is. Attaching holds up no other thread."""
        ways = self.slots
        while True:
            with self._news:
                if self._batch.size >= self.slots:
                    ways -= 1
                    if ways < 0 or not self._make_way():
                        return
                chosen = self._schedule.pick(self._ready)
            if chosen is None:
                return
            error = None if chosen.version is None else self._residents.attach(chosen.version)
            with self._news:
                if error is None:
                    self._join(chosen)
                else:
                    self._schedule.done(chosen)
                    self._end_failed_one(chosen, error, events)

    def _warm(self, version: str) -> None:
        if not self._residents.gone(version):
            with self._news:
                ready = self._residents.ready(version)
            if ready:
                self._residents.attach(version)

    def _make_way(self) -> bool:
        """Put a row aside whose account has had far more than another that waits; it goes on later where it was."""
        rows = {r.request.id: r for r in self._batch.everybody if not r.todo}
        if len(self._aside) >= 2 * self.slots:
            return False
        owed = self._schedule.owed([r.request for r in rows.values()], self._ready)
        if owed is None:
            return False
        row = rows[owed.id]
        self._batch.put_aside(row)
        self._aside[owed.id] = row
        self._made_way += 1
        self._schedule.put_back(owed)
        if owed.version is not None:
            self._residents.versions[owed.version].running -= 1
        return True

    def _ready(self, request: Request) -> bool | None:
        return True if request.version is None else self._residents.ready(request.version)

    def _join(self, request: Request) -> None:
        version, s = request.version, request.sampling
        traits = self._batch.bare
        if version is not None:
            self._residents.versions[version].running += 1
        aside = self._aside.pop(request.id, None)
        if aside is not None:
            self._batch.join(aside)
            return
        if version is not None:
            traits = self._residents.versions[version].traits
        ends = tuple(sorted({*([] if s.ignore_eos else self.words.eos), *s.stop_tokens}))
        row = Row(
            request=request,
            sink=self._sinks[request.id],
            chooser=Chooser(s, frozenset(request.prompt), ends),
            text=None if self.words.tokenizer is None else Text(self.words.decode, s.stop),
            traits=traits,
            todo=list(request.prompt),
            eos=self.words.eos,
            limit=min(s.max_tokens, self.max_length - len(request.prompt) - traits.added),
        )
        if row.limit < 1:
            row.limit = 1  # the positions before a prompt leave room for one token at least: slots grow
        self._batch.join(row)

    def _speak(self, said: list[Said]) -> list[tuple[Row, Event]]:
        """A token for each row and the text that it makes."""
        if not said:
            return []
        rows = [row for group, _ in said for row in group]
        logits = said[0][1] if len(said) == 1 else torch.cat([x for _, x in said])
        tokens, told = choose(logits, [r.chooser for r in rows])
        return [(row, row.say(token, logprob)) for row, token, logprob in zip(rows, tokens, told)]
