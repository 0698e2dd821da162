"""The ledger: one line for each finished run, on disk before the next begins.

The file is only ever appended to, and every line is flushed to the disk before `append` returns. A kill can
therefore cost the line that was being written and nothing else: a torn last line is dropped on reading and
cut off before the next append. A lock on the folder keeps a second process out; the system releases it when
its holder dies.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from veneer._disk import sync
from veneer.errors import BadFile, TrainingFailed


class Ledger:
    """`ledger.jsonl` in a folder: `lines` as read at opening and appended since."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "ledger.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lines, self._whole_bytes = _read(self.path)

    def append(self, line: dict[str, Any]) -> None:
        """Add one line; when this returns, it survives a kill and a power cut."""
        data = json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        is_new = not self.path.exists()
        with open(self.path, "r+b" if not is_new else "w+b") as file:
            file.truncate(self._whole_bytes)  # cuts off a torn last line
            file.seek(self._whole_bytes)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync(self.path.parent)
        self._whole_bytes += len(data)
        self.lines.append(json.loads(data))

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("kind") == kind]

    def last(self, kind: str) -> dict[str, Any] | None:
        found = self.of_kind(kind)
        return found[-1] if found else None


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    if not path.exists():
        return [], 0
    lines, whole = [], 0
    pieces = path.read_bytes().split(b"\n")
    for number, piece in enumerate(pieces[:-1], start=1):  # what follows the last newline is torn, or empty
        try:
            line = json.loads(piece)
            if not isinstance(line, dict):
                raise ValueError
        except ValueError:
            if number == len(pieces) - 1:  # a torn block that happened to hold a newline
                break
            raise BadFile(
                f"line {number} of {path} is not JSON: the ledger was edited, or its disk is damaged.",
                next_step="delete that line (its run is done again), or use a new output folder",
            ) from None
        lines.append(line)
        whole += len(piece) + 1
    return lines, whole


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the folder: a second comparison in it is an error at once, not a garbled ledger."""
    import filelock

    path = Path(folder) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise TrainingFailed(
            f"another comparison is running in {path.parent}.",
            next_step="wait until it ends, or give another output folder",
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` as a whole: readers see the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)
