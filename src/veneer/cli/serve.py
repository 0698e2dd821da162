"""`veneer serve`: adapters of any method over one base, behind OpenAI's routes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

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
    model: Annotated[
        str | None, typer.Option("--model", help="the base: builtin:NAME, a folder, a hub id")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="NAME=DIR, as train wrote it; may be given again")
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option("--adapters", help="a folder of adapters; one that is dropped in appears")
    ] = None,
    host: Annotated[
        str, typer.Option(help="where to listen; elsewhere than here a key is needed")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one", min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key", envvar="VENEER_API_KEY", help="a key that may use and manage; may be given again"
        ),
    ] = None,
    keys: Annotated[Path | None, typer.Option("--keys", help="a file of keys' hashes and scopes")] = None,
    new_key: Annotated[
        str | None,
        typer.Option("--new-key", metavar="NAME", help="write a new key into --keys FILE, print it, end"),
    ] = None,
    scope: Annotated[list[str] | None, typer.Option("--scope", help="of the new key: use, manage")] = None,
    allow_no_key: Annotated[
        bool,
        typer.Option("--allow-no-key", help="listen elsewhere without a key: whoever reaches it may use it"),
    ] = False,
    allow_origin: Annotated[
        list[str] | None, typer.Option("--allow-origin", help="a site whose pages may call from a browser")
    ] = None,
    allow_folder: Annotated[
        list[Path] | None,
        typer.Option("--allow-folder", help="a folder that POST /v1/adapters may read from"),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", help="keep adapters and names here; a restart comes back with them"),
    ] = None,
    served_name: Annotated[
        str | None, typer.Option("--served-name", help="how clients name the base")
    ] = None,
    slots: Annotated[int, typer.Option(help="rows that run together", min=1)] = 8,
    max_length: Annotated[int | None, typer.Option(help="tokens of a prompt with its answer")] = None,
    queue: Annotated[
        int, typer.Option(help="requests that may wait; more are told to come again", min=1)
    ] = 256,
    memory_budget: Annotated[str | None, typer.Option(help="of adapters in memory, as 2GiB")] = None,
    in_flight: Annotated[int | None, typer.Option(help="requests of one key at a time", min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="of one key", min=1)] = None,
    quantise: Annotated[str | None, typer.Option(help="the base in fewer bits: int8, nf4")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="refuse fields that are not known")] = False,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="write prompts and answers to the log")
    ] = False,
    vllm_metrics: Annotated[
        bool, typer.Option("--vllm-metrics", help="metrics under vLLM's names too")
    ] = False,
    on: Annotated[
        str | None,
        typer.Option("--on", help="ray: several replicas through Ray Serve (pip install 'veneer[ray]')"),
    ] = None,
    replicas: Annotated[int, typer.Option(help="with --on ray: servers that share the work", min=1)] = 2,
    drain: Annotated[
        float, typer.Option(help="seconds that running requests get after SIGTERM", min=0)
    ] = 30.0,
    between_tokens: Annotated[
        float, typer.Option(help="seconds that a job may put between two tokens of an answer", min=0)
    ] = 0.2,
    jobs: Annotated[int, typer.Option(help="fine-tuning jobs that train together", min=1)] = 4,
    device: Device = None,
    dtype: Dtype = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Adapters of any method over one base, behind OpenAI's routes. Ctrl-C or SIGTERM ends it when all is answered."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise missing_package(error.name or "fastapi", "serve", "veneer serve") from None
    from veneer.serving.app import Keys, Settings
    from veneer.serving.app.running import Plan, log_to_stderr, run

    if new_key is not None:
        _make_key(new_key, keys, scope or ["use"])
        return
    if model is None:
        raise BadOption("veneer serve needs a base.", next_step="veneer serve --model builtin:smollm2")
    if on not in (None, "ray"):
        raise BadOption(f"--on {on}: expected ray.", next_step="veneer serve --on ray --replicas 2")
    known = Keys(api_key or (), keys)
    is_local = host in LOOPBACK
    if not is_local and not known.required and not allow_no_key:
        raise BadOption(
            f"--host {host} is open to other machines, and no key was given.",
            next_step="veneer serve --new-key NAME --keys FILE    makes a key; then --keys FILE, or --allow-no-key",
        )
    settings = Settings(
        served_name=served_name,
        also_named=(model,), strict=strict, log_prompts=log_prompts, vllm_names=vllm_metrics, in_flight=in_flight,
        tokens_per_minute=tokens_per_minute, drain_seconds=drain, allow_origins=tuple(allow_origin or ()),
        hosts=LOOPBACK if is_local and not known.required else None,
    )  # fmt: skip
    plan = Plan(
        model, named_folders(adapter or ()), _folder(adapters), tuple(allow_folder or ()), state, host, port,
        {"slots": slots, "max_length": max_length, "queue_limit": queue, "dtype": dtype, "quantise": quantise,
         "device": device, "memory_budget": None if memory_budget is None else bytes_of(memory_budget)},
        between_tokens, jobs,
    )  # fmt: skip
    still()
    log_to_stderr()
    if on is None:
        run(plan, settings, known, note)
        return
    from veneer.serving.app import replicas as several

    several.run(plan, settings, (api_key or (), keys), replicas=replicas, say=note)


def _make_key(name: str, file: Path | None, scopes: Sequence[str]) -> None:
    from veneer.serving.app import new_key

    if file is None:
        raise BadOption(
            "--new-key needs --keys FILE.", next_step=f"veneer serve --new-key {name} --keys keys.json"
        )
    secret = new_key(file, name, scopes)
    note(
        f"'{name}' may {' and '.join(scopes)}. This is the only showing of its key; {file} has a hash of it."
    )
    result({"name": name, "key": secret}, secret)


def _folder(watched: Path | None) -> Path | None:
    if watched is not None and not watched.is_dir():
        raise BadOption(f"--adapters {watched} is no folder.", next_step=f"mkdir -p {watched}")
    return watched


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
            raise BadOption(
                f"Two adapters are called '{name}'.", next_step="give each a name: --adapter NAME=DIR"
            )
        if not Path(folder).is_dir():
            raise BadOption(
                f"--adapter {text}: there is no folder {folder}.",
                next_step="veneer train --output DIR    writes one",
            )
        found[name] = Path(folder)
    return found


def bytes_of(text: str) -> int:
    """ "2GiB" -> 2147483648."""
    number = text.strip().lower()
    unit = number.lstrip("0123456789.").strip()
    try:
        return int(float(number[: len(number) - len(unit)]) * UNITS[unit])
    except (KeyError, ValueError):
        raise BadOption(f"{text!r} is no number of bytes.", next_step="512MiB, 2GiB") from None
