"""`veneer serve`: adapters of any method over one base, behind OpenAI's routes."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli._common import Debug, Device, Dtype, Quiet, note, result, still
from veneer.errors import BadOption, missing_package

EXAMPLES = (
    "veneer serve --model builtin:smollm2 --adapter support=runs/two",
    "veneer serve --model builtin:smollm2 --adapters adapters --host 0.0.0.0 --keys keys.json",
    "veneer serve --new-key phone --keys keys.json",
)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def serve(
    model: Annotated[str | None, typer.Option("--model", help="the base: builtin:NAME, a folder, a hub id")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="NAME=DIR, as train wrote it; may be given again")
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option("--adapters", help="a folder of adapters; one that is dropped in appears")
    ] = None,
    host: Annotated[str, typer.Option(help="where to listen; elsewhere than here a key is needed")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one", min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", envvar="VENEER_API_KEY", help="a key that may use and manage; may be given again"),
    ] = None,
    keys: Annotated[Path | None, typer.Option("--keys", help="a file of keys' hashes and scopes")] = None,
    new_key: Annotated[
        str | None, typer.Option("--new-key", metavar="NAME", help="write a new key into --keys FILE, print it, end")
    ] = None,
    scope: Annotated[list[str] | None, typer.Option("--scope", help="of the new key: use, manage")] = None,
    allow_no_key: Annotated[
        bool, typer.Option("--allow-no-key", help="listen elsewhere without a key: whoever reaches it may use it")
    ] = False,
    allow_origin: Annotated[
        list[str] | None, typer.Option("--allow-origin", help="a site whose pages may call from a browser")
    ] = None,
    allow_folder: Annotated[
        list[Path] | None, typer.Option("--allow-folder", help="a folder that POST /v1/adapters may read from")
    ] = None,
    state: Annotated[
        Path | None, typer.Option("--state", help="keep adapters and names here; a restart comes back with them")
    ] = None,
    served_name: Annotated[str | None, typer.Option("--served-name", help="how clients name the base")] = None,
    slots: Annotated[int, typer.Option(help="rows that run together", min=1)] = 8,
    max_length: Annotated[int | None, typer.Option(help="tokens of a prompt and its answer; default: the base's")] = None,
    queue: Annotated[int, typer.Option(help="requests that may wait; more are told to come again", min=1)] = 256,
    memory_budget: Annotated[str | None, typer.Option(help="for adapters in memory, as 2GiB; default: no limit")] = None,
    in_flight: Annotated[int | None, typer.Option(help="requests of one key at a time", min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="of one key", min=1)] = None,
    quantise: Annotated[str | None, typer.Option(help="the base in fewer bits: int8, nf4")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="refuse fields that are not known")] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="write prompts and answers to the log")] = False,
    vllm_metrics: Annotated[bool, typer.Option("--vllm-metrics", help="metrics under vLLM's names too")] = False,
    drain: Annotated[float, typer.Option(help="seconds that running requests get after SIGTERM", min=0)] = 30.0,
    device: Device = None,
    dtype: Dtype = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve adapters of any method over one base, with OpenAI's routes. Ctrl-C or SIGTERM ends it when all is answered."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise missing_package(error.name or "fastapi", "serve", "veneer serve") from None
    from veneer.serving.app import Keys, Settings
    from veneer.serving.app import new_key as make_key

    if new_key is not None:
        if keys is None:
            raise BadOption("--new-key needs --keys FILE.", next_step=f"veneer serve --new-key {new_key} --keys keys.json")
        secret = make_key(keys, new_key, scope or ["use"])
        note(f"'{new_key}' may {' and '.join(scope or ['use'])}. This is its only showing; {keys} has a hash.")
        result({"name": new_key, "key": secret}, secret)
        return
    if model is None:
        raise BadOption("veneer serve needs a base.", next_step="veneer serve --model builtin:smollm2")
    known = Keys(api_key or (), keys)
    is_local = host in LOOPBACK
    if not is_local and not known.required and not allow_no_key:
        raise BadOption(
            f"--host {host} is open to other machines, and no key was given.",
            next_step="--api-key KEY, or --keys FILE (veneer serve --new-key NAME --keys FILE makes one), or --allow-no-key",
        )
    named = named_folders(adapter or ())
    budget = None if memory_budget is None else bytes_of(memory_budget)
    settings = Settings(
        served_name=served_name, strict=strict, log_prompts=log_prompts, vllm_names=vllm_metrics, in_flight=in_flight,
        tokens_per_minute=tokens_per_minute, drain_seconds=drain, allow_origins=tuple(allow_origin or ()),
        hosts=LOOPBACK if is_local and not known.required else None,
    )  # fmt: skip
    still()
    opening = {
        "slots": slots, "max_length": max_length, "queue_limit": queue, "memory_budget": budget, "dtype": dtype,
        "quantise": quantise, "device": device,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        place = state or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="veneer-serve-")))
        shelf = Shelf(place, named, adapters, allow_folder or ())
        stack.callback(shelf.close)
        run(model, opening, shelf, settings, known, host, port)


class Shelf:
    """The registry that the server starts with: names of the command line, a watched folder, what was kept."""

    def __init__(self, place: Path, named: dict[str, Path], watched: Path | None, allowed: Sequence[Path]) -> None:
        from veneer.serving import Registry

        if watched is not None and not watched.is_dir():
            raise BadOption(f"--adapters {watched} is no folder.", next_step=f"mkdir -p {watched}")
        roots = [*allowed, *([watched] if watched is not None else [])]
        self.registry = Registry(place, roots)
        self.named, self.watched = named, watched
        self.watcher: Any = None

    def fill(self, engine: Any) -> None:
        """Check and register everything on the base that is now in memory. On the side thread that opened it."""
        from veneer.serving import Watcher, check_on

        self.registry.check = check_on(engine.model)
        self.registry.base = engine.model_name
        self.registry.serve(engine.add)
        for name, folder in self.named.items():
            self.registry.register(name, folder, trusted=True, ready=engine.add)
        if self.watched is not None:
            self.watcher = Watcher(self.registry, self.watched, engine.add)
            self.watcher.look(patient=False)
            self.watcher.start()

    def close(self) -> None:
        if self.watcher is not None:
            self.watcher.stop()
        self.registry.close()


def run(model: str, opening: dict[str, Any], shelf: Shelf, settings: Any, keys: Any, host: str, port: int) -> None:
    """Listen, open the engine meanwhile, and end when a signal says so and all is answered."""
    import uvicorn

    from veneer.serving import Engine
    from veneer.serving.app import Late, create_app

    made: list[Any] = []

    def opener() -> Any:
        engine = Engine.open(model, **opening)
        made.append(engine)
        shelf.fill(engine)
        names = ", ".join(v.name for v in shelf.registry.versions()) or "none"
        note(f"ready: {engine.model_name} on {address}; adapters: {names}")
        return engine

    late = Late(opener, failed=lambda: stop())
    app = create_app(late, shelf.registry, settings, keys)
    config = uvicorn.Config(
        app, host=host, port=port, log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=int(settings.drain_seconds), timeout_keep_alive=30,
    )  # fmt: skip
    server = uvicorn.Server(config)
    listening = _listen(config)
    address = f"http://{'[' + host + ']' if ':' in host else host}:{listening.getsockname()[1]}"

    def stop() -> None:
        server.should_exit = True

    log_to_stderr()
    note(f"listening on {address}, reading {model}; Ctrl-C ends it")
    try:
        with _signals(lambda: app.state.service.stop()):
            server.run(sockets=[listening])
    finally:
        for engine in made:
            engine.close()
    if late.failure is not None:
        raise late.failure


def _listen(config: Any) -> Any:
    """A socket, before anything is read: a port in use is said at once."""
    import socket

    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((config.host, config.port))
    except OSError as error:
        listening.close()
        raise BadOption(
            f"{config.host}:{config.port} cannot be listened on: {error.strerror}.",
            next_step="--port 0 takes a free port",
        ) from None
    return listening


@contextlib.contextmanager
def _signals(stop: Any) -> Iterator[None]:
    """SIGTERM ends with code 0 once all is answered: the server raises the signal again when it has drained."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def log_to_stderr() -> None:
    """One JSON object a request, one line each; and what goes wrong."""
    import logging

    logger = logging.getLogger("veneer.serving")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def named_folders(given: Sequence[str]) -> dict[str, Path]:
    """["support=runs/two"] -> {"support": Path("runs/two")}; a folder alone is called as it is."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals:
            name, folder = Path(text).name, text
        if not name or not folder:
            raise BadOption(f"--adapter {text!r} is not NAME=DIR.", next_step="--adapter support=runs/two")
        if name in found:
            raise BadOption(f"Two adapters are called '{name}'.", next_step="give each a name: --adapter NAME=DIR")
        if not Path(folder).is_dir():
            raise BadOption(
                f"--adapter {text}: there is no folder {folder}.", next_step="veneer train ... --output DIR    writes one"
            )
        found[name] = Path(folder)
    return found


def bytes_of(text: str) -> int:
    """"2GiB" -> 2147483648."""
    number = text.strip().lower()
    unit = number.lstrip("0123456789.").strip()
    try:
        return int(float(number[: len(number) - len(unit)]) * UNITS[unit])
    except (KeyError, ValueError):
        raise BadOption(f"{text!r} is no number of bytes.", next_step="512MiB, 2GiB") from None
