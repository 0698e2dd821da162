"""What all routes share: engine, registry, mailbox, limits and counters, and how a name becomes a version."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from veneer.errors import UnknownAdapter, VeneerError
from veneer.serving import Event, Request

from .calls import Call, Mailbox
from .errors import ApiError, as_api_error
from .keys import Key, Keys
from .limits import Limits
from .metrics import Metrics
from .pieces import Pieces
from .record import Record
from .settings import Settings

T = TypeVar("T")


class Version(Protocol):
    """An adapter as the registry knows it."""

    digest: str
    name: str
    method: str
    bytes: int
    created: float
    state: str
    score: Any


class Registry(Protocol):
    def resolve(self, name: str) -> Any: ...

    def versions(self) -> Sequence[Any]: ...


class Engine(Protocol):
    model_name: str
    max_length: int
    tokenizer: Any
    alive: bool

    def submit(self, request: Request, sink: Callable[[list[Event]], None]) -> None: ...

    def cancel(self, request_id: str) -> None: ...

    def encode(self, text: str) -> Sequence[int]: ...

    def encode_chat(self, messages: list[dict[str, str]], **options: Any) -> Sequence[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def stats(self) -> dict[str, Any]: ...


class Late:
    """An engine or a registry that is not there yet: whoever asks it for something is told to come again.

    Until `put` gives it what it stands for, every use raises a 503; then it is as good as the thing itself.
    """

    def __init__(self) -> None:
        self._thing: Any = None

    def put(self, thing: Any) -> None:
        self._thing = thing

    @property
    def is_open(self) -> bool:
        return self._thing is not None

    def __getattr__(self, name: str) -> Any:
        thing = self.__dict__.get("_thing")
        if thing is None:
            raise ApiError(503, "The base is being read: try again soon.", code="loading", retry_after=2)
        return getattr(thing, name)


@dataclass(frozen=True)
class Target:
    """What a request's model field means: a version of an adapter under its name, or the bare base."""

    name: str  # echoed to the client
    version: str | None
    method: str

    @property
    def shown(self) -> str:
        return "base" if self.version is None else "sha256:" + self.version.removeprefix("sha256:")


@dataclass
class Service:
    engine: Any
    registry: Registry
    keys: Keys
    settings: Settings
    metrics: Metrics
    limits: Limits
    reading: Any = None  # the engine of adapters with a head, where there is one
    tuning: Any = None  # the jobs that train, where there are any
    began: float = field(default_factory=time.time)
    draining: bool = False
    mailbox: Mailbox | None = None
    texts: ThreadPoolExecutor | None = None

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop runs. One thread for tokenising: a long prompt does not hold up the loop."""
        self.draining, self.mailbox = False, Mailbox(loop)
        self.texts = ThreadPoolExecutor(1, "veneer-texts")

    def drain(self) -> None:
        """Nothing new is let in; what runs is answered."""
        self.draining = True

    def end(self) -> None:
        self.drain()
        if self.texts is not None:
            self.texts.shutdown(wait=False)

    @property
    def is_ready(self) -> bool:
        is_open = getattr(self.engine, "is_open", True)
        return bool(is_open and not self.draining and self.engine.alive)

    @property
    def training(self) -> int:
        """Jobs that train now."""
        is_there = self.tuning is not None and getattr(self.tuning, "is_open", True)
        return len(self.tuning.cohort) if is_there else 0

    @functools.cached_property
    def pieces(self) -> Pieces:
        return Pieces(self.engine)

    @functools.cached_property
    def base(self) -> str:
        """How clients name the base: never by a folder of the server's."""
        if self.settings.served_name:
            return self.settings.served_name
        name = str(self.engine.model_name)
        is_folder = name.startswith(("/", ".", "~")) or "\\" in name or Path(name).is_dir()
        return Path(name).resolve().name if is_folder else name

    async def target(self, asked: str, key: Key) -> Target:
        """The registry looks on the disk, so it is asked on another thread.

        Raises:
            ApiError: 404 for a name that nothing has, with the nearest ones, or that the key may not see.
        """
        name = asked
        for base in (self.base, self.engine.model_name, *self.settings.also_named):
            if asked == base:
                return Target(self.base, None, "")
            name = name.removeprefix(f"{base}:") if name == asked else name
        try:
            version = await asyncio.to_thread(self.registry.resolve, name)
        except VeneerError as error:
            wrong = as_api_error(error)
            raise ApiError(404, wrong.message, param="model", code="model_not_found") from None
        if key.adapters is not None and version.name not in key.adapters:
            raise ApiError(
                404, f"No adapter is called {name[:100]!r}.", param="model", code="model_not_found"
            )
        return Target(version.name, version.digest, version.method)

    def check_words(self) -> None:
        """Raises ApiError where texts can be neither read nor written."""
        if self.engine.tokenizer is None:
            raise ApiError(
                400, f"{self.base} is served without a tokenizer, so that it neither reads nor writes texts.",
                param="model", code="no_tokenizer",
            )  # fmt: skip

    def check_writes(self) -> None:
        """Raises ApiError where the base answers no prompt."""
        if not getattr(self.engine, "writes", True):
            raise ApiError(
                400, f"{self.base} does not write text. /v1/classify, /v1/tag, /v1/translate and /v1/embeddings are "
                "answered, with an adapter's name as the model.", param="model", code="writes_no_text",
            )  # fmt: skip
        self.check_words()

    def _unknown(self, target: Target, error: UnknownAdapter) -> ApiError:
        """An adapter that the engine does not have: it reads, or it was retired between its naming and its asking."""
        try:
            task = self.reading.task(str(target.version)).name
        except (AttributeError, VeneerError):
            return ApiError(404, as_api_error(error).message, param="model", code="model_not_found")
        return ApiError(
            400, f"'{target.name}' is an adapter for the task {task!r}, which writes no answer to a prompt. "
            "/v1/classify, /v1/tag and /v1/translate answer for such adapters.", param="model", code="writes_no_text",
        )  # fmt: skip

    async def listed(self, key: Key) -> list[Any]:
        """The versions that names point to, as far as this key may see them."""
        found = await asyncio.to_thread(self.registry.versions)
        return [v for v in found if key.adapters is None or v.name in key.adapters]

    async def in_texts(self, work: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Do something with the tokenizer, off the loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.texts, functools.partial(work, *arguments, **options))

    def call(self, rows: Sequence[Request], key: Key, record: Record, target: Target) -> Call:
        """Let the rows of a request in and start them."""
        if self.draining:
            raise ApiError(503, "The server is stopping.", code="draining", retry_after=5)
        if not self.engine.alive:
            raise ApiError(503, "The engine has stopped; the server's log says why.", code="engine_stopped")
        assert self.mailbox is not None
        self.limits.enter(key)

        def closed(call: Call) -> None:
            self.limits.leave(key)
            self.limits.pay(key, sum(call.completion_tokens))
            self.metrics.finished(call, target)

        call = Call(self.engine, self.mailbox, rows, record, closed)
        try:
            call.start()
        except UnknownAdapter as error:
            raise self._unknown(target, error) from None
        except Exception as error:
            raise as_api_error(error, "prompt") from error
        self.limits.pay(key, sum(len(row.prompt) for row in rows))
        return call
