"""`veneer doctor`: versions, devices, threads, and what is missing with the line that installs it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import typer

from veneer.cli._common import AsJson, Debug, Quiet, human, result
from veneer.cli._table import facts

EXAMPLES = ("veneer doctor", "veneer doctor --json")
SHOWN = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "safetensors", "peft")


def doctor(as_json: AsJson = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """What this machine has, and what is missing; the exit code is 1 where a needed package is missing."""
    found = examined()
    result(found, _text(found))
    if found["missing"].get("") or found["outdated"]:
        raise typer.Exit(1)


def examined() -> dict[str, Any]:
    """Versions, devices, threads, memory, caches, missing packages by extra."""
    import torch

    import veneer

    missing, outdated = packages()
    return {
        "veneer": veneer.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in SHOWN},
        "devices": devices(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory(),
        "offline": os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"),
        "cache": cache(),
        "missing": missing,
        "outdated": outdated,
    }


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[str]:
    import torch

    found = ["cpu"]
    for at in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(at)
        found.append(f"cuda:{at} {torch.cuda.get_device_name(at)}, {human(free)} of {human(total)} free")
    if getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available():
        found.append("mps")
    return found


def memory() -> int | None:
    """Bytes of the machine's memory, where the system says so."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def cache() -> dict[str, Any]:
    """Where bases and data sets that packages carry are kept, and the room that is left."""
    place = Path(os.environ.get("VENEER_CACHE") or Path.home() / ".cache" / "veneer").expanduser()
    at = place
    while not at.exists():
        at = at.parent
    return {"folder": str(place), "free_bytes": shutil.disk_usage(at).free}


def packages() -> tuple[dict[str, list[str]], list[str]]:
    """({extra: missing packages}, "NAME VERSION, needs SPEC" of those that are too old), as veneer declares them."""
    missing: dict[str, list[str]] = {}
    outdated: list[str] = []
    for line in importlib.metadata.requires("veneer") or ():
        match = re.match(r"([A-Za-z0-9_.-]+)(\[[^]]*\])?\s*([^;]*)(?:;(.*))?", line)
        assert match is not None
        name, _, wanted, marker = match.groups()
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker or "")
        if name == "veneer" or (extra and extra.group(1) == "dev"):
            continue
        have = version(name)
        if have is None:
            missing.setdefault(extra.group(1) if extra else "", []).append(name)
        elif wanted and not _fits(have, wanted):
            outdated.append(f"{name} {have}, needs {wanted.strip()}")
    return missing, outdated


def _fits(have: str, wanted: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(wanted.strip(" ()")).contains(have, prereleases=True)
    except ImportError:
        return True


def _text(found: dict[str, Any]) -> str:
    pairs = [
        ("veneer", found["veneer"]),
        ("python", f"{found['python']} ({sys.executable})"),
        ("system", found["platform"]),
        *((name, value or "not installed") for name, value in found["versions"].items()),
        ("devices", "\n".join(found["devices"])),
        ("threads", f"{found['threads']} on {found['processors']} processors"),
        ("memory", "unknown" if found["memory_bytes"] is None else human(found["memory_bytes"])),
        ("hub", "offline (HF_HUB_OFFLINE is set)" if found["offline"] else "asked for what is not here"),
        ("cache", f"{found['cache']['folder']}, {human(found['cache']['free_bytes'])} free"),
    ]  # fmt: skip
    for extra, names in found["missing"].items():
        install = f"pip install 'veneer[{extra}]'" if extra else "pip install veneer"
        pairs.append(("missing", f"{', '.join(names)}:  {install}"))
    pairs += [("too old", f"{text}:  pip install --upgrade {text.split()[0]}") for text in found["outdated"]]
    if not found["missing"] and not found["outdated"]:
        pairs.append(("missing", "nothing"))
    return facts(pairs)
