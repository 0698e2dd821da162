"""A hidden folder beside a place: what is written there is moved to the place at the end, or never.

A process that is killed leaves its folder behind. Its lock dies with it, and that is how the next one that writes or
reads at the same place tells a folder that was left from one that is being written.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is swept
    fcntl = None  # type: ignore[assignment]

SETTLED = 60.0  # seconds: a folder this new may not have its lock yet


@contextmanager
def beside(target: Path, names: Collection[str]) -> Iterator[Path]:
    """The folder, gone at the end. names: of the files that are written into it."""
    sweep(target, names)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    held = _lock(made)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        if held is not None:
            os.close(held)


def sweep(target: Path, names: Collection[str]) -> list[Path]:
    """Remove what killed processes left beside `target`; return it.

    Only folders of our own form, that hold nothing but `names`, are older than a minute and locked by nobody.
    """
    if fcntl is None or not target.name:
        return []
    form = re.compile(re.escape(f".{target.name}-") + r"[a-z0-9_]{8}")
    gone = []
    try:
        found = [p for p in target.parent.iterdir() if form.fullmatch(p.name)]
    except OSError:
        return []
    for folder in found:
        if not _is_ours(folder, names):
            continue
        held = _lock(folder)
        if held is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)
            gone.append(folder)
    return gone


def _is_ours(folder: Path, names: Collection[str]) -> bool:
    try:
        entries = list(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else None
        return (
            entries is not None
            and time.time() - folder.stat().st_mtime > SETTLED
            and all(e.name in names and e.is_file() for e in entries)
        )
    except OSError:
        return False


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder until it is closed or its process ends; None where another holds it."""
    if fcntl is None:
        return None
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks
        os.close(held)
        return None
    return held
