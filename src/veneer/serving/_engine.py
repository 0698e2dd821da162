"""The engine: one base, many adapters, and requests that come and go while it runs.

One thread owns the model. Other threads hand it requests and commands, and get events through the sinks that they
gave. A step is: commands, then rows that join, then a forward or two, then one token for every row, then events: one
call of each sink, whatever number of its requests had news.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from veneer.bases import fingerprint
from veneer.errors import BadOption, Unsupported, VeneerError

from ._batch import Batch
from ._prefix import Prefixes
from ._request import Answer, Event, PromptTooLong, Request, Sampling
from ._residents import Residents, free
from ._row import Row, Sink
from ._sampling import Chooser, choose
from ._schedule import Schedule
from ._text import Text
from ._words import Words

T = TypeVar("T")
log = logging.getLogger("veneer.serving")
MOST_POSITIONS = 4096  # of a row, where neither the base nor the user says


class Engine:
    """Serves a base and adapters of any method. Use `Engine.open`, or give a model that is in memory.

    slots: rows that run together. max_length: positions of a row; the base's own by default. memory_budget: bytes that
    attached adapters may take. queue_limit: requests that may wait. weights: {key or version: share of the tokens}.
    prefill: tokens of prompts that one step reads, so that a long prompt does not hold up rows that speak.
    prefix_budget: bytes of beginnings of prompts that are kept for others that begin alike; 0 for none.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        name: str = "base",
        slots: int = 8,
        max_length: int | None = None,
        memory_budget: int | None = None,
        queue_limit: int = 256,
        weights: Mapping[str, float] | None = None,
        patience: float = 30.0,
        prefill: int | None = None,
        prefix_budget: int = 256 << 20,
        same_base: bool = True,
    ) -> None:
        if slots < 1:
            raise BadOption(f"slots={slots}: expected at least one row.", next_step="slots=8")
        self.model, self.model_name, self.slots = model.eval(), name, slots
        self.words = Words(tokenizer, model)
        self.tokenizer = tokenizer
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
        self._thread.start()

    @classmethod
    def open(
        cls,
        model: str,
        *,
        dtype: Any = None,
        quantise: str | None = None,
        matmul: str | None = None,
        device: Any = None,
        **options: Any,
    ) -> Engine:
        """An engine over the base that `model` names: builtin:NAME, a folder, a hub id. options: as for the class.

        matmul: how frozen weights multiply (see `veneer.bases.matmul`); prepacked float32 where nothing is said.
        """
        from veneer.bases import open_base

        task = None if model.startswith(("builtin:", "module:")) else "lm"
        if matmul is None and quantise is None:
            matmul = "packed"
        base = open_base(model, dtype=dtype, device=device, task=task, quantise=quantise, matmul=matmul)
        if not hasattr(base.model, "generate"):
            raise Unsupported(
                f"'{model}' is a {type(base.model).__name__}, which does not write text.",
                next_step="serve a causal language model",
            )
        options.setdefault("same_base", dtype is None and quantise is None)
        return cls(base.model, base.tokenizer, name=base.name, **options)

    # -- adapters --------------------------------------------------------------------------------------------------

    def add(self, version: str, folder: str | Path, *, warm: bool = False) -> None:
        """Make an adapter known; it is read when it is first asked for, or now with warm=True.

        Raises what can be told without reading its tensors: BadFile, ShapeDiffers, UnknownMethod, BadOption.
        """
        self._check_alive()
        self._residents.add(version, Path(folder))
        if warm:
            with self._news:
                reading = self._residents.read(version)
            if reading is not None:
                reading.add_done_callback(lambda _: self._command(lambda: self._warm(version)))

    def remove(self, version: str, *, drain: bool = True) -> None:
        """No new requests for it; those that began with it finish, or (drain=False) are cancelled. Then its memory
        is given back."""
        self._residents.leave(version)
        if not drain:
            with self._news:
                self._cancelled.update(self._ids_of(version))
                self._news.notify_all()

    @property
    def versions(self) -> tuple[str, ...]:
        return tuple(v for v, s in self._residents.stats().items() if s["state"] != "draining")

    # -- requests --------------------------------------------------------------------------------------------------

    def submit(self, request: Request, sink: Sink) -> None:
        """Take a request on. `sink` gets its events, together with those of its other requests, once a step.

        Raises QueueFull, UnknownVersion, PromptTooLong, and BadOption for what no row can do.
        """
        self._check(request)
        with self._news:
            self._check_alive()
            if self._draining:
                raise Unsupported("the engine is finishing its last requests and takes no new ones.",
                                  next_step="ask another server, or try again later")  # fmt: skip
            if request.id in self._sinks:
                raise BadOption(
                    f"a request with id '{request.id}' is running already.", next_step="another id"
                )
            self._schedule.check(self._rate())
            if request.version is not None:
                self._residents.begin(request.version)
            self._sinks[request.id] = sink
            self._schedule.push(request)
            self._news.notify_all()

    def cancel(self, request_id: str) -> None:
        """Its row is free after the step that runs; its last event says "cancelled". Unknown ids are no error."""
        with self._news:
            if request_id in self._sinks:
                self._cancelled.add(request_id)
                self._news.notify_all()

    def generate(
        self,
        prompt: str | Sequence[Any],
        version: str | None = None,
        *,
        key: str = "",
        sampling: Sampling | None = None,
        **options: Any,
    ) -> Answer:
        """One answer, waited for. prompt: text, messages or token ids; options: those of `Sampling`."""
        tokens: list[int] = []
        told: list[Any] = []
        text = ""
        for event in self.stream(prompt, version, key=key, sampling=sampling, **options):
            text += event.text
            tokens.extend(event.tokens)
            told.extend(event.logprobs)
            if event.finish is not None:
                if event.error is not None:
                    raise event.error
                return Answer(
                    text, tuple(tokens), event.finish, tuple(told), event.prompt_tokens,
                    event.completion_tokens, event.cached_tokens,
                )  # fmt: skip
        raise RuntimeError("a request ended without a finish")

    def stream(
        self,
        prompt: str | Sequence[Any],
        version: str | None = None,
        *,
        key: str = "",
        sampling: Sampling | None = None,
        **options: Any,
    ) -> Iterator[Event]:
        """The events of one request, as they come. Leaving the loop early cancels it."""
        sampling = Sampling(**options) if sampling is None else sampling
        request = Request(tuple(self._ids(prompt)), sampling, version, key)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()

        def sink(found: list[Event]) -> None:
            for event in found:
                events.put(event)

        self.submit(request, sink)
        try:
            while True:
                event = events.get()
                yield event
                if event.finish is not None:
                    return
        finally:
            self.cancel(request.id)

    def _ids(self, prompt: str | Sequence[Any]) -> list[int]:
        if isinstance(prompt, str):
            return self.words.encode(prompt)
        if prompt and isinstance(prompt[0], Mapping):
            messages: Sequence[Any] = prompt
            return self.words.encode_chat(messages)
        return [int(i) for i in prompt]

    # -- words -----------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        return self.words.encode(text)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        return self.words.encode_chat(messages, **options)

    def decode(self, ids: Sequence[int]) -> str:
        return self.words.decode(ids)

    # -- life ------------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._error is None

    def do(self, work: Callable[[nn.Module], T]) -> Future[T]:
        """Run `work(model)` between two steps, on the thread that owns the model: for embeddings, a training step."""
        future: Future[T] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work(self.model))
            except BaseException as e:
                future.set_exception(e)

        self._check_alive()
        self._command(command)
        return future

    def stats(self) -> dict[str, Any]:
        """What an operator looks at, as plain data."""
        with self._news:
            rows = self._batch.everybody
            return {
                "alive": self.alive,
                "queue": self._schedule.length,
                "rows": len(rows),
                "slots": self.slots,
                "adapters_running": len({r.name for r in rows if r.name is not None}),
                "residents": self._residents.stats(),
                "resident_bytes": self._residents.bytes,
                "loads": self._residents.loads,
                "evictions": self._residents.evictions,
                "cache_bytes": self._batch.slots.bytes,
                "prefix": {
                    "asked": self._prefixes.asked,
                    "hits": self._prefixes.hits,
                    "bytes": self._prefixes.bytes,
                },
                "tokens": {v: dict(c) for v, c in self._counts.items()},
                "steps": self._steps,
                "made_way": self._made_way,
                "step_seconds": [s for s, _ in self._seconds],
                "served": {name: a.served for name, a in self._schedule.accounts.items()},
                "in_slots": self._batch.in_slots,
            }

    def drain(self, timeout: float | None = None) -> bool:
        """Take nothing new and wait for what runs; whether all of it ended in `timeout` seconds."""
        with self._news:
            self._draining = True
            return self._news.wait_for(lambda: not self._sinks or not self.alive, timeout)

    def close(self) -> None:
        """End: what still runs is cancelled, threads end, the base is bare again."""
        with self._news:
            self._draining = self._closing = True
            self._news.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._residents.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # -- checks ----------------------------------------------------------------------------------------------------

    def _check(self, request: Request) -> None:
        s = request.sampling
        if not request.prompt:
            raise BadOption("the prompt has no tokens.", next_step="give at least one")
        if len(request.prompt) >= self.max_length:
            raise PromptTooLong(
                f"the prompt has {len(request.prompt)} tokens; a row has {self.max_length} positions, and one of them "
                "is for the answer.",
                next_step="a shorter prompt, or a larger max_length",
            )
        wrong = [i for i in request.prompt if not 0 <= i < self.words.vocabulary]
        if wrong:
            raise BadOption(
                f"token {wrong[0]} is none of this base's {self.words.vocabulary}.",
                next_step="engine.encode(text) makes token ids",
            )
        bounds = (
            ("max_tokens", s.max_tokens >= 1, "at least 1"),
            ("temperature", s.temperature >= 0, "at least 0"),
            ("top_p", 0 < s.top_p <= 1, "above 0 and at most 1"),
            ("top_k", s.top_k >= 0, "at least 0"),
            ("min_p", 0 <= s.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", s.repetition_penalty > 0, "above 0"),
        )
        for name, good, expected in bounds:
            if not good:
                raise BadOption(
                    f"{name}={getattr(s, name)!r}: expected {expected}.",
                    next_step="Sampling(max_tokens=64, temperature=0.7, top_p=0.9)",
                )

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

    # -- the model's thread ------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._news:
            self._news.notify_all()

    def _command(self, command: Callable[[], Any]) -> None:
        with self._news:
            self._commands.append(command)
            self._news.notify_all()

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
                    return True
                if self.spare is not None and self.spare.wanted:
                    return True
                for version in self._residents.sweep():
                    self._prefixes.drop(version)
                # The reader wakes this thread; the timeout is for a wait on patience alone.
                self._news.wait(1.0 if self._schedule.length else None)
            return False

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
        events: list[tuple[Sink, Event]] = []
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
            with self._news:
                self._speak(said, events)
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

    def _admit(self, events: list[tuple[Sink, Event]]) -> None:
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

    def _end_failed(self, events: list[tuple[Sink, Event]]) -> None:
        """Requests that wait for an adapter which cannot be used."""
        for request in self._schedule.waiting():
            error = None if request.version is None else self._residents.failure(request.version)
            if error is not None:
                self._schedule.remove(request.id)
                self._end_failed_one(request, error, events)

    def _end_failed_one(self, request: Request, error: Exception, events: list[tuple[Sink, Event]]) -> None:
        aside = self._aside.pop(request.id, None)
        event = Event(request.id, finish="error", error=error, prompt_tokens=len(request.prompt))
        self._end_waiting(
            request, event if aside is None else aside.event(finish="error", error=error), events
        )

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

    def _speak(self, said: list[tuple[Row, torch.Tensor]], events: list[tuple[Sink, Event]]) -> None:
        if not said:
            return
        rows = [row for row, _ in said]
        tokens, told = choose(torch.stack([logits for _, logits in said]), [r.chooser for r in rows])
        for row, token, logprob in zip(rows, tokens, told):
            event = row.say(token, logprob)
            self._schedule.charge(row.request, 1)
            if event.finish is None:
                events.append((row.sink, event))
            else:
                self._finish(row, event, events)

    def _finish(self, row: Row, event: Event, events: list[tuple[Sink, Event]], spoilt: bool = False) -> None:
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

    def _end_waiting(self, request: Request, event: Event, events: list[tuple[Sink, Event]]) -> None:
        if request.version is not None:
            self._residents.end(request.version)
        counts = self._counts.setdefault(request.version or "", Counter())
        counts["requests"] += 1
        counts[event.finish or ""] += 1
        events.append((self._sinks.pop(request.id), event))

    def _end_cancelled(self, events: list[tuple[Sink, Event]]) -> None:
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

    def _emit(self, events: list[tuple[Sink, Event]]) -> None:
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
        events: list[tuple[Sink, Event]] = []
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
