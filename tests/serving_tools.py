"""An engine without a model, a registry without files, and a server of both on a loopback port, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import uvicorn

from veneer.errors import UnknownAdapter, VeneerError, nearest
from veneer.serving import Event, Logprob, Request


class QueueFull(VeneerError):
    retry_after = 3.0


class ByteTokenizer:
    """A token is a byte."""

    chat_template = "there is one"

    def __len__(self):
        return 256

    def convert_ids_to_tokens(self, ids):
        return [chr(i) for i in ids]

    def encode(self, text, add_special_tokens=True):
        return list(text.encode())


class EchoEngine:
    """Says its prompt backwards, again and again, one byte a step for every row; an adapter `shout` in capitals.

    `step_seconds` is slow enough to look between two steps; `hold` stops it; `broken` versions fail.
    """

    def __init__(
        self, *, model_name="builtin:echo", max_length=512, slots=64, queue_limit=256, step_seconds=0.001,
        longest_answer=1 << 30,
    ):  # fmt: skip
        self.model_name, self.max_length, self.tokenizer = model_name, max_length, ByteTokenizer()
        self.slots, self.queue_limit, self.step_seconds = slots, queue_limit, step_seconds
        self.longest_answer = longest_answer
        self.running: dict[str, tuple[Request, list[int]]] = {}
        self.sinks, self.cancelled, self.sink_calls, self.steps = {}, [], 0, 0
        self.hold, self.broken = threading.Event(), {"sha256:broken"}
        self.hold.set()
        self.versions: set[str] = set()
        self.alive, self._lock = True, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="echo", daemon=True)
        self._thread.start()

    def encode(self, text):
        return list(text.encode())

    def encode_chat(self, messages, **options):
        if messages[-1]["role"] == "system":
            raise RuntimeError("the last message has to be a user's")
        return list("".join(m["content"] for m in messages).encode())

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")

    def submit(self, request, sink):
        with self._lock:
            if len(self.running) >= self.queue_limit:
                raise QueueFull(f"{len(self.running)} requests wait.", next_step="try again")
            self.running[request.id], self.sinks[request.id] = (request, []), sink

    def cancel(self, name):
        with self._lock:
            self.running.pop(name, None)
            self.sinks.pop(name, None)
            self.cancelled.append(name)

    def stats(self):
        return {
            "rows": min(self.slots, len(self.running)),
            "queue": max(0, len(self.running) - self.slots),
            "slots": self.slots,
            "residents": {"sha256:aa11": {"tier": "memory", "bytes": 64}},
        }

    def add(self, version, folder):
        self.versions.add(version)

    def remove(self, version, *, drain=True):
        self.versions.discard(version)

    def close(self):
        self.alive = False
        self.hold.set()
        self._thread.join(5)

    def _run(self):
        while self.alive:
            self.hold.wait()
            time.sleep(self.step_seconds)
            with self._lock:
                found = [(self.sinks[name], self._step(*row)) for name, row in list(self.running.items())]
                for _, event in found:
                    if event.finish:
                        self.running.pop(event.id), self.sinks.pop(event.id)
            by_sink = {}
            for sink, event in found:
                by_sink.setdefault(id(sink), (sink, []))[1].append(event)
            for sink, events in by_sink.values():
                self.sink_calls += 1
                sink(events)
            self.steps += bool(found)

    def _step(self, request, said):
        if request.version in self.broken:
            failed = VeneerError("/srv/secret/adapters/broken/adapter.safetensors is truncated.")
            return Event(request.id, finish="error", error=failed)
        s = request.sampling
        token = request.prompt[::-1][len(said) % len(request.prompt)]
        if request.version == "sha256:bb22":
            token = ord(chr(token).upper())
        if s.temperature > 0 and s.seed is not None:
            token = 97 + (s.seed + len(said)) % 26
        said.append(token)
        text, finish = chr(token), None
        if any(bytes(said).decode("latin-1").endswith(stop) for stop in s.stop):
            text, finish = "", "stop"
        elif len(said) >= min(s.max_tokens, self.longest_answer):
            finish = "length"
        logprobs = ()
        if s.logprobs is not None:
            top = tuple((t, -0.5 - i) for i, t in enumerate((token, 65, 66)[: s.logprobs]))
            logprobs = (Logprob(token, -0.5, top),)
        counts = (len(request.prompt), len(said), min(4, len(request.prompt))) if finish else (0, 0, 0)
        return Event(request.id, text, (token,), logprobs, finish, None, *counts)


@dataclass(frozen=True)
class FakeVersion:
    name: str
    digest: str
    method: str = "lora"
    bytes: int = 64
    created: float = 1700000000.0
    state: str = "verified"
    score: float | None = 0.91


class Shelf:
    """Names and versions as the registry has them."""

    def __init__(self, *versions):
        self.aliases = {v.name: v for v in versions}

    def resolve(self, text):
        name, _, wanted = text.partition("@")
        found = self.aliases.get(name)
        if found is None or (wanted and not found.digest.removeprefix("sha256:").startswith(wanted)):
            raise UnknownAdapter(f"No adapter is called '{text}'.", nearest=nearest(text, self.aliases))
        return found

    def versions(self):
        return list(self.aliases.values())


def shelf():
    return Shelf(
        FakeVersion("support", "sha256:aa11"),
        FakeVersion("shout", "sha256:bb22", method="loreft"),
        FakeVersion("broken", "sha256:broken"),
    )


@contextlib.contextmanager
def running(app) -> Iterator[SimpleNamespace]:
    """`app` on a free loopback port, in a thread of this process; gone when the block is left."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=5)
        )
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.005)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            yield SimpleNamespace(url=url, server=server, thread=thread)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def until(condition, seconds=5.0):
    """Whether `condition()` came true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return False
