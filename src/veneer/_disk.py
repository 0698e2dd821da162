"""What is written survives a cut of the power: one way to push a file, or the entries of a folder, to the disk."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Push a file, or a folder's list of names, to the disk. Nothing where the system cannot open folders."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
