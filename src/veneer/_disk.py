"""Files: one way to push what is written to the disk, and one to have a tensor lie in a file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


def sync(path: Path) -> None:
    """Push a file, or a folder's list of names, to the disk. Nothing where the system cannot open folders."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def mapped(numbers: int, dtype: torch.dtype) -> Tensor:
    """(numbers,) in a file that has no name any more: the system takes it back when the process ends.

    Raises OSError where there is no room.
    """
    handle, path = tempfile.mkstemp(prefix="veneer-")
    try:
        size = max(1, numbers * dtype.itemsize)
        if hasattr(os, "posix_fallocate"):  # a full disk says so here, not by killing the process at a write
            os.posix_fallocate(handle, 0, size)
        else:
            os.truncate(handle, size)
        return torch.from_file(path, shared=True, size=numbers, dtype=dtype)
    finally:
        os.close(handle)
        os.unlink(path)
