"""The facts of a run: machine, versions, threads, seed, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def facts(seed: int, repeats: int) -> dict[str, Any]:
    """What a reader needs to make the run again, and to judge it."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_memory()}, {platform.system()} {platform.machine()}",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load at the start": f"{load:.1f} (process CPU time is measured; ratios hold, absolute times drift)",
        "threads": torch.get_num_threads(),
        "versions": ", ".join(
            [f"python {platform.python_version()}"]
            + [f"{name} {_version(name)}" for name in ("torch", "transformers", "peft", "veneer")]
        ),
        "seed": seed,
        "repeats": f"{repeats}, arms in turn, medians and quartiles of paired ratios",
        "commit": commit(),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown memory"


def commit() -> str:
    """The commit of the checkout that holds this file, and whether its files differ from it."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../")
        return git("rev-parse", "--short=12", "HEAD") + (", with uncommitted changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "not in a checkout"
