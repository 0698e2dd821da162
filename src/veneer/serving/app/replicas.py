"""Several replicas of the server, through Ray Serve: a gate in front sends each request where its adapter is loaded.

Every replica is a whole server of its own: base, engine, registry. They share the folder of adapters, which each of
them watches, so that one dropped in appears everywhere; what would change one replica alone is refused at the gate.
A request whose replica died before a byte of the answer is sent to another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from veneer.errors import missing_package

from . import create_app
from .errors import ApiError
from .keys import Keys
from .running import Opening, Plan
from .service import Late
from .settings import Settings

LOGGER = logging.getLogger("veneer.serving")
LOADED = 64  # adapters of which a replica is remembered to have them
CHANGES = ("/v1/adapters", "/v1/files", "/v1/fine_tuning", "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
           "/load_lora_adapter", "/unload_lora_adapter")  # fmt: skip


def run(
    plan: Plan, settings: Settings, keys: tuple[Sequence[str], Path | None], *, replicas: int = 2,
    say: Callable[[str], None] = lambda text: None,
) -> None:  # fmt: skip
    """Serve through Ray until SIGTERM or SIGINT. keys: what `Keys` is made from, for each replica makes its own.

    Raises:
        MissingPackage: Ray Serve is not installed.
        VeneerError: a replica could not open the base or an adapter.
    """
    ended = threading.Event()
    with _signals(ended), deployed(plan, settings, keys, replicas=replicas) as address:
        say(f"ready: {plan.model} on {address}, {replicas} replicas; Ctrl-C ends it")
        ended.wait()


@contextlib.contextmanager
def deployed(
    plan: Plan, settings: Settings, keys: tuple[Sequence[str], Path | None] = ((), None), *, replicas: int = 2
) -> Iterator[str]:
    """The replicas behind one address, ready; afterwards they are gone."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise missing_package(error.name or "ray", "ray", "veneer serve --on ray") from None
    own: dict[str, Any] = {}
    if "RAY_ADDRESS" not in os.environ:
        own = {"include_dashboard": False, "num_cpus": max(replicas, os.cpu_count() or 1)}
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.WARNING, **own)
    try:
        serve.start(http_options={"host": plan.host, "port": plan.port})
        worker = serve.deployment(
            num_replicas=replicas, max_ongoing_requests=256, ray_actor_options={"num_cpus": 0},
            health_check_period_s=2, graceful_shutdown_timeout_s=settings.drain_seconds,
        )(_with_multiplexing(Worker))  # fmt: skip
        gate = serve.deployment(max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0})(Gate)
        serve.run(gate.bind(worker.bind(plan, settings, keys), settings, replicas), name="veneer")
        yield f"http://{plan.host}:{plan.port}"
    finally:
        serve.shutdown()
        ray.shutdown()


class Worker:
    """One replica: the whole application, called without a socket."""

    def __init__(self, plan: Plan, settings: Settings, keys: tuple[Sequence[str], Path | None]) -> None:
        engine, registry, reading = Late(), Late(), Late()
        self.opening = Opening(plan, engine, registry, reading, Late())
        self.opening.open()
        self.app = create_app(engine, registry, settings, Keys(*keys), reading=reading)
        self.engine = engine
        self.life: Any = None

    async def loaded(self, name: str) -> str:
        """Called for a name that this replica has not served lately: from here on it is known to have it."""
        return name

    async def answer(self, scope: dict[str, Any], body: bytes, name: str) -> AsyncIterator[Any]:
        """(status, headers), then the pieces of the body."""
        if self.life is None:
            self.life = self.app.router.lifespan_context(self.app)
            await self.life.__aenter__()
        if name:
            await self.loaded(name)
        async for message in respond(self.app, scope, body):
            if message["type"] == "http.response.start":
                yield message["status"], message["headers"]
            elif message.get("body"):
                yield message["body"]

    def check_health(self) -> None:
        if not self.engine.alive:
            raise RuntimeError("the engine has stopped")

    def __del__(self) -> None:
        if hasattr(self, "opening"):
            self.opening.close()


def _with_multiplexing(worker: type) -> type:
    """Ray learns from calls of `loaded` which replica has which adapter."""
    from ray import serve

    made = type(worker.__name__, (worker,), {"__doc__": worker.__doc__})
    made.loaded = serve.multiplexed(max_num_models_per_replica=LOADED)(worker.loaded)  # type: ignore[attr-defined]
    return made


async def respond(app: Any, scope: dict[str, Any], body: bytes) -> AsyncIterator[dict[str, Any]]:
    """The messages with which an ASGI application answers one request; leaving early is the client's leaving."""
    said: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    left, asked = asyncio.Event(), False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    task = asyncio.ensure_future(app(scope, receive, said.put))
    task.add_done_callback(lambda _: said.put_nowait(None))
    try:
        while (message := await said.get()) is not None:
            yield message
        await task
    finally:
        left.set()


class Gate:
    """What listens: reads the name of the adapter, and passes everything else on."""

    def __init__(self, workers: Any, settings: Settings, replicas: int) -> None:
        self.workers, self.settings, self.replicas = workers, settings, replicas

    async def __call__(self, request: Request) -> Response:
        try:
            return await self.pass_on(request)
        except ApiError as error:
            return error.response()
        except ClientDisconnect:
            return Response(status_code=499)

    async def pass_on(self, request: Request) -> Response:
        if request.method not in ("GET", "HEAD", "OPTIONS") and request.url.path.startswith(CHANGES):
            raise ApiError(
                501, "Behind several replicas adapters come and go by the folder of --adapters, which all of "
                "them watch; jobs need a server of their own.", code="not_on_replicas",
            )  # fmt: skip
        body = await self._body(request)
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": request.method,
            "scheme": request.url.scheme, "path": request.scope["path"], "raw_path": request.scope.get("raw_path"),
            "query_string": request.scope["query_string"], "root_path": "", "headers": request.scope["headers"],
            "client": request.scope.get("client"), "server": request.scope.get("server"),
        }  # fmt: skip
        name = named(body)
        for left in reversed(range(self.replicas + 1)):
            pieces = self.workers.options(stream=True, multiplexed_model_id=name).answer.remote(
                scope, body, name
            )
            try:
                status, headers = await anext(pieces)
            except Exception as error:
                if not left or not _is_lost(error):
                    raise
                LOGGER.warning("a replica is gone; its request goes to another one")
                continue
            response = StreamingResponse(_until_left(pieces), status)
            response.raw_headers = [(bytes(k), bytes(v)) for k, v in headers]
            return response
        raise ApiError(503, "No replica answers.", code="no_replica", retry_after=5)

    async def _body(self, request: Request) -> bytes:
        found = bytearray()
        async for piece in request.stream():
            found += piece
            if len(found) > self.settings.max_body:
                raise ApiError(413, f"The body is larger than {self.settings.max_body} bytes.")
        return bytes(found)


async def _until_left(pieces: Any) -> AsyncIterator[bytes]:
    try:
        async for piece in pieces:
            yield piece
    finally:
        pieces.cancel()


def named(body: bytes) -> str:
    """The adapter that a request names, "" for none: where it goes is a matter of speed, never of the answer."""
    try:
        found = json.loads(body)["model"]
    except (ValueError, KeyError, TypeError):
        return ""
    return found[:200] if isinstance(found, str) else ""


def _is_lost(error: BaseException) -> bool:
    from ray.exceptions import RayError

    return isinstance(error, RayError) and not hasattr(error, "as_instanceof_cause")


@contextlib.contextmanager
def _signals(ended: threading.Event) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, lambda *_: ended.set()) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
