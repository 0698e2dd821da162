"""From the engine's thread to the event loop and back: one HTTP request's rows, until each has finished.

The engine calls one sink once a step with everything that the step brought; the sink makes one
`call_soon_threadsafe`, and on the loop events are sorted into the calls that wait for them. Nothing here knows torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from veneer.serving import Event, Request

from .errors import ApiError, as_api_error
from .record import Record


class Submits(Protocol):
    """What a call needs of the engine."""

    def submit(self, request: Request, sink: Callable[[list[Event]], None]) -> None: ...

    def cancel(self, request_id: str) -> None: ...


class Mailbox:
    """The one sink of a server: `mailbox(events)` is called by the engine's thread, once a step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: dict[str, Call] = {}

    def __call__(self, events: list[Event]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: list[Event]) -> None:
        now = time.perf_counter()
        for event in events:
            call = self._calls.get(event.id)
            if call is not None:
                call._take(event, now)
            if event.finish is not None:
                self._calls.pop(event.id, None)

    def enrol(self, call: Call) -> None:
        self._calls.update(dict.fromkeys(call.places, call))

    def dismiss(self, call: Call) -> None:
        for name in call.places:
            self._calls.pop(name, None)

    def __len__(self) -> int:
        return len(self._calls)


class Call:
    """The rows of one HTTP request. `await call.more()` gives what came, by row; `close` frees what still runs.

    Args:
        rows: prompts times n requests; a row's place is its index among the choices.
        on_close: told once, when the call is over in whatever way.
    """

    def __init__(
        self,
        engine: Submits,
        mailbox: Mailbox,
        rows: Sequence[Request],
        record: Record,
        on_close: Callable[[Call], None],
    ) -> None:
        self.rows, self.record = rows, record
        self.places = {row.id: place for place, row in enumerate(rows)}
        self.running: set[str] = set()
        self.prompt_tokens = [0] * len(rows)
        self.completion_tokens = [0] * len(rows)
        self.cached_tokens = [0] * len(rows)
        self.finishes: list[str] = []  # of rows that have ended
        self.first: float | None = None  # when the first token came
        self.gaps: list[float] = []  # seconds between tokens of one row
        self._last: dict[str, float] = {}
        self._engine, self._mailbox, self._on_close = engine, mailbox, on_close
        self._waiting: list[tuple[int, Event]] = []
        self._news = asyncio.Event()
        self._closed = False

    def start(self) -> None:
        """Hand all rows to the engine, or none: where one is refused, those before it are taken back."""
        self._mailbox.enrol(self)
        try:
            for row in self.rows:
                self._engine.submit(row, self._mailbox)
                self.running.add(row.id)
        except BaseException:
            self.record.outcome = "refused"
            self.close()
            raise

    async def more(self) -> list[tuple[int, Event]]:
        """Everything that came since the last look, at least one event; empty when all rows have finished.

        Raises:
            ApiError: a row failed, or was ended by someone else than this call.
        """
        while not self._waiting:
            if not self.running:
                return []
            self._news.clear()
            await self._news.wait()
        found, self._waiting = self._waiting, []
        for _, event in found:
            if event.finish == "error":
                raise as_api_error(event.error or RuntimeError("a row failed")) from event.error
            if event.finish == "cancelled":
                raise ApiError(503, "The server ended this request before it was done.", code="cancelled")
        return found

    def _take(self, event: Event, now: float) -> None:
        place = self.places[event.id]
        if event.tokens:
            self.completion_tokens[place] += len(event.tokens)
            if self.first is None:
                self.first = now
            if event.id in self._last:
                self.gaps.append((now - self._last[event.id]) / len(event.tokens))
            self._last[event.id] = now
        if event.finish is not None:
            self.running.discard(event.id)
            self.finishes.append(event.finish)
            self.prompt_tokens[place] = event.prompt_tokens
            self.cached_tokens[place] = event.cached_tokens
            self.completion_tokens[place] = event.completion_tokens or self.completion_tokens[place]
        self._waiting.append((place, event))
        self._news.set()

    def close(self) -> None:
        """Give back the rows that still run. The second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for name in self.running:
            self._engine.cancel(name)
        self._mailbox.dismiss(self)
        self._on_close(self)


async def while_connected(receive: Callable[[], Awaitable[Any]], work: Awaitable[Any]) -> bool:
    """Do `work`, or drop it as soon as the client has gone away; whether it was done."""
    doing = asyncio.ensure_future(work)
    going = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({doing, going}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            doing.result()
            return True
        return False
    finally:
        for task in (doing, going):
            task.cancel()
        await asyncio.gather(doing, going, return_exceptions=True)


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
