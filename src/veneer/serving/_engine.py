"""The engine: one base, many adapters, and requests that come and go while it runs.

One thread owns the model (`_loop`). Other threads hand it requests and commands here, and get events through the sinks
that they gave.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from veneer.errors import BadOption, Unsupported

from ._loop import Loop
from ._request import Answer, Event, Request, Sampling, check
from ._row import Sink

T = TypeVar("T")


class Engine(Loop):
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
        self.model_name, self.tokenizer = name, tokenizer
        super().__init__(
            model, tokenizer, slots, max_length, memory_budget, queue_limit, weights, patience, prefill, prefix_budget,
            same_base,
        )  # fmt: skip
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
        check(request, self.max_length, self.words.vocabulary)
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
