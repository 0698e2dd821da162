"""One server from its start to its end: listen, read the base meanwhile, answer, drain, give everything back.

The socket is there first: a port in use is said before anything is read, and who asks meanwhile is told to come again.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from veneer.errors import BadOption
from veneer.serving import Engines, FineTuning, Registry, Watcher, check_for, open_engines, ready_on

from . import create_app
from .keys import Keys
from .service import Late
from .settings import Settings


@dataclass(frozen=True)
class Plan:
    """What a server is to serve, and where.

    adapters: names and folders that it starts with. watched: a folder whose sub-folders are adapters.
    allowed: folders that clients may register adapters from. state: what is registered is kept here; None: nothing is.
    engine: options of `veneer.serving.Engine.open`.
    between_tokens: seconds that may pass between two tokens for the sake of jobs that train; jobs: how many of them
    train together.
    """

    model: str
    adapters: Mapping[str, Path] = field(default_factory=dict)
    watched: Path | None = None
    allowed: Sequence[Path] = ()
    state: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    engine: Mapping[str, Any] = field(default_factory=dict)
    between_tokens: float = 0.2
    jobs: int = 4


class Server(uvicorn.Server):
    """Tells the application that it drains as soon as a signal says so, while connections are still answered."""

    def __init__(self, config: uvicorn.Config, draining: Callable[[], None]) -> None:
        super().__init__(config)
        self.draining = draining

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.draining()
        super().handle_exit(sig, frame)


class Opening:
    """The base, the engine and the registry, made on a side thread; all that is to be given back at the end."""

    def __init__(self, plan: Plan, engine: Late, registry: Late, reading: Late, tuning: Late) -> None:
        self.plan, self.engine, self.registry = plan, engine, registry
        self.reading, self.tuning = reading, tuning
        self.failure: BaseException | None = None
        self._stack = contextlib.ExitStack()
        self._closing, self._lock = False, threading.Lock()

    def open(self) -> None:
        """Everything of the plan, or the first thing that is wrong with it."""
        plan = self.plan
        engine, reading = open_engines(plan.model, **plan.engine)
        if not self._keep(engine.close) or not self._keep(reading.close):
            return
        place = plan.state
        if place is None:
            kept = tempfile.TemporaryDirectory(prefix="veneer-serve-", ignore_cleanup_errors=True)
            self._keep(kept.cleanup)
            place = Path(kept.name)
        roots = [*plan.allowed, *([plan.watched] if plan.watched is not None else [])]
        registry = Registry(place, roots, check=check_for(engine, reading), base=engine.model_name)
        if not self._keep(registry.close):
            return
        ready = ready_on(Engines(engine, reading))
        registry.serve(ready)
        for name, folder in plan.adapters.items():
            registry.register(name, folder, trusted=True, ready=ready)
        if plan.watched is not None:
            watcher = Watcher(registry, plan.watched, ready)
            watcher.look(patient=False)
            watcher.start()
            self._keep(watcher.stop)
        tuning = FineTuning(
            engine, registry, ready=ready, between_tokens=plan.between_tokens, together=plan.jobs
        )
        tuning.start()
        if not self._keep(tuning.stop):
            return
        self.tuning.put(tuning)
        self.registry.put(registry)
        self.reading.put(reading)
        self.engine.put(engine)

    def _keep(self, close: Callable[[], Any]) -> bool:
        """Remember how to give something back; at once, and False, where the server has ended meanwhile."""
        with self._lock:
            if not self._closing:
                self._stack.callback(close)
                return True
        close()
        return False

    def close(self) -> None:
        with self._lock:
            self._closing = True
        self._stack.close()


def run(plan: Plan, settings: Settings, keys: Keys, say: Callable[[str], None] = lambda text: None) -> None:
    """Serve until SIGTERM or SIGINT, then answer what runs and return.

    Raises:
        VeneerError: the port is taken, the base cannot be read, an adapter does not fit it.
    """
    engine, registry, reading, tuning = Late(), Late(), Late(), Late()
    opening = Opening(plan, engine, registry, reading, tuning)
    app = create_app(engine, registry, settings, keys, reading=reading, tuning=tuning)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )  # fmt: skip
    service = app.state.service
    server = Server(config, service.drain)
    listening = listen(plan.host, plan.port)
    host = f"[{plan.host}]" if ":" in plan.host else plan.host
    address = f"http://{host}:{listening.getsockname()[1]}"

    def open_all() -> None:
        try:
            opening.open()
            names = ", ".join(v.name for v in registry.versions()) or "none yet"
            say(f"ready: {service.base} on {address}, adapters: {names}")
        except BaseException as error:
            opening.failure = error
            server.should_exit = True

    say(f"listening on {address}, reading {plan.model}; Ctrl-C ends it")
    threading.Thread(target=open_all, name="veneer-opening", daemon=True).start()
    try:
        with _sigterm_ends_well():
            server.run(sockets=[listening])
    finally:
        listening.close()
        opening.close()
    if opening.failure is not None and not server.force_exit:
        raise opening.failure


def listen(host: str, port: int) -> socket.socket:
    """Raises BadOption where the address is not to be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
    except OSError as error:
        raise BadOption(f"{host}: {error.strerror}.", next_step="--host 127.0.0.1") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise BadOption(
            f"{host}:{port} cannot be listened on: {error.strerror}.",
            next_step="--port 0 takes a free port, --port N another one",
        ) from None
    return listening


@contextlib.contextmanager
def _sigterm_ends_well() -> Iterator[None]:
    """The server raises a signal again when it has drained; a SIGTERM that was answered is no failure."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def log_to_stderr() -> None:
    """One JSON object a line for each request, and what goes wrong."""
    logger = logging.getLogger("veneer.serving")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
