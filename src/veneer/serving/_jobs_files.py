"""Files that jobs train on: conversations as JSON lines, read before they are kept, and kept by their content.

A file's bytes lie once in `root`, under their SHA-256; its record is a row beside the jobs. What a file is cannot
change after that, so a job that goes on after a restart goes on with the very same rows.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from veneer.data import Splits, read
from veneer.errors import BadData, BadFile, BadOption, UnknownName, nearest

from ._registry_jobs import Job, Jobs

KIND = "file"
PURPOSE = "fine-tune"
LARGEST = 512 << 20  # bytes
TASK = "instruct"


class NotThere(UnknownName):
    """An id is no file's, or no job's."""


@dataclass(frozen=True)
class TrainingFile:
    """A file as its record has it. rows: conversations in it."""

    id: str
    name: str
    bytes: int
    digest: str
    rows: int
    created: float


class Files:
    """root: a folder of the server's own. largest: bytes that one file may have."""

    def __init__(self, root: Path, jobs: Jobs, *, largest: int = LARGEST) -> None:
        self.root, self.jobs, self.largest = Path(root), jobs, largest
        self.root.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, data: bytes, purpose: str = PURPOSE) -> TrainingFile:
        """Keep a file. Raises BadOption for another purpose, BadFile for its size, BadData for rows that cannot be
        trained on, with their lines."""
        if purpose != PURPOSE:
            raise BadOption(
                f"purpose={purpose[:50]!r} is none that files are taken for.",
                nearest=[PURPOSE],
                next_step=f"purpose={PURPOSE}",
            )
        if len(data) > self.largest:
            raise BadFile(f"the file has more than {self.largest:,} bytes.", next_step="a smaller file")
        name = Path(name).name[:200] or "file.jsonl"
        digest = hashlib.sha256(data).hexdigest()
        target = self._place(digest)
        fresh = not target.exists()
        if fresh:
            self._write(target, data)
        try:
            rows = len(self._read(target, name).train)
        except BaseException:
            if fresh:
                target.unlink(missing_ok=True)
            raise
        body = {"name": name, "bytes": len(data), "digest": digest, "rows": rows}
        made = self.jobs.create(KIND, body, state="processed", id=f"file-{os.urandom(12).hex()}")
        return _file(made)

    def get(self, id: str) -> TrainingFile:
        known = {job.id: job for job in self.jobs.listed(KIND, "processed")}
        if id not in known:
            raise NotThere(
                f"there is no file '{id[:100]}'.",
                nearest=nearest(id, known),
                next_step="GET /v1/files    lists all",
            )
        return _file(known[id])

    def listed(self) -> list[TrainingFile]:
        """The newest first."""
        return [_file(job) for job in reversed(self.jobs.listed(KIND, "processed"))]

    def content(self, id: str) -> bytes:
        return self._place(self.get(id).digest).read_bytes()

    def remove(self, id: str) -> None:
        """Forget a file; its bytes go with the last record of them."""
        gone = self.get(id)
        self.jobs.update(id, state="deleted")
        if not any(f.digest == gone.digest for f in self.listed()):
            self._place(gone.digest).unlink(missing_ok=True)

    def splits(self, training: str, validation: str | None = None) -> Splits:
        """The rows of a file to train on, and those of another to look at."""
        found = self.get(training)
        splits = self._read(self._place(found.digest), found.name)
        if validation is not None:
            other = self.get(validation)
            splits.validation = self._read(self._place(other.digest), other.name).train
        return splits

    def _read(self, path: Path, name: str) -> Splits:
        try:
            splits = read(str(path), task=TASK, sizes={"validation": 0, "test": 0})
        except BadData as error:
            said = error.what.replace(str(path), name)
            raise BadData(said, nearest=error.nearest, next_step=error.next_step) from None
        splits.spec = name  # where the server keeps it is nobody's business
        return splits

    def _place(self, digest: str) -> Path:
        return self.root / f"{digest}.jsonl"

    def _write(self, target: Path, data: bytes) -> None:
        handle, unfinished = tempfile.mkstemp(dir=self.root, prefix=".")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)


def _file(job: Job) -> TrainingFile:
    body = job.body
    return TrainingFile(job.id, body["name"], body["bytes"], body["digest"], body["rows"], job.created)
