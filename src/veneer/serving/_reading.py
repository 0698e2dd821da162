"""The reading engine: classes, numbers, tags, translations and embeddings from adapters behind one base.

One thread owns the models. Rows that wait while a forward runs go into the next one together, whoever asked for
them: the base runs once for all, with the adapter of each row, and each adapter's task reads its own rows' logits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from veneer import engine
from veneer.errors import BadOption, Unsupported, nearest
from veneer.tasks import Task

from ._reading_loop import ReadingLoop
from ._reading_rows import (
    Found,
    Job,
    Pooling,
    Row,
    Version,
    columns_of,
    fail,
)
from ._reading_shells import READ, Opener, fit, spec_opener
from ._reading_tasks import task_of
from ._registry_content import Content
from ._request import QueueFull, UnknownVersion


class ReadingEngine(ReadingLoop):
    """opener: opens the base for a task, as `spec_opener` does. batch_rows, batch_tokens: most of one forward, padding
    counted. memory_budget: bytes of attached adapters, None for no bound. queue_limit: rows that may wait.
    """

    def __init__(
        self, opener: Opener, *, batch_rows: int = 32, batch_tokens: int = 4096, memory_budget: int | None = None,
        queue_limit: int = 4096,
    ) -> None:  # fmt: skip
        super().__init__(opener, batch_rows, batch_tokens, memory_budget, queue_limit)

    @classmethod
    def open(
        cls, spec: str, *, dtype: Any = None, quantise: str | None = None, model: Any = None, **limits: Any
    ) -> ReadingEngine:
        """For the base that `spec` names. model: (an open causal model of it, its tokenizer), to be shared."""
        made = cls(spec_opener(spec, dtype=dtype, quantise=quantise, model=model), **limits)
        if model is not None:
            made._shells.share(model[0])
        return made

    # -- versions -------------------------------------------------------------------------------------------------

    @property
    def versions(self) -> tuple[str, ...]:
        with self._news:
            return tuple(n for n, v in self._versions.items() if not v.leaving)

    def add(self, version: str, folder: str | Path) -> None:
        """Make a version known; its tensors are read when it is first asked for."""
        folder = Path(folder)
        made = Version(version, folder, task_of(folder))
        with self._news:
            there = self._versions.get(version)
            if there is not None and not there.leaving:
                raise BadOption(
                    f"version '{version}' is known already; a version never changes.",
                    next_step="give what changed a version of its own",
                )
            if there is not None:
                there.leaving = False
            else:
                self._versions[version] = made

    def remove(self, version: str, *, drain: bool = True) -> None:
        """No new requests for it. Those that wait are answered, or (drain=False) dropped; then its memory is free."""
        with self._news:
            found = self._known(version)
            found.leaving = True
            for job in self._jobs if not drain else ():
                if job.version is found:
                    job.answer.cancel()
            self._news.notify_all()

    def check(self, folder: Path, content: Content | None = None) -> None:
        """A registry's check: whether an adapter goes on this base with its head. Raises what `veneer.load` raises."""
        read = engine.read_adapter(folder)
        with self._models:
            name = f"checked {folder.name}"
            shell = fit(self._shells, task_of(folder), read, name)
            host = engine.host_of(shell.model)
            now = engine.fingerprint(host.anatomy, shell.model, host.adapter(name).plan)
            engine.detach(shell.model, name)
        then = read.record.get("base", {}).get("fingerprint", {}) if read.record else {}
        if then.get("values", now["values"]) != now["values"]:
            raise BadOption(
                "the adapter was trained on a base with other weights than the one that is served.",
                next_step="serve the base that its veneer.json names",
            )

    def _known(self, version: str) -> Version:
        found = self._versions.get(version)
        if found is None or found.leaving:
            raise UnknownVersion(
                f"there is no adapter of version '{version[:80]}'.",
                nearest=nearest(version, self._versions),
                next_step="engine.add(version, folder) makes it known",
            )
        return found

    # -- asking ---------------------------------------------------------------------------------------------------

    def task(self, version: str) -> Task:
        """What a version's adapter was trained for. Raises UnknownVersion, and Unsupported where it reads no text."""
        with self._news:
            found = self._known(version)
        if found.task is None or found.task.name not in READ:
            name = "none" if found.task is None else f"'{found.task.name}'"
            raise Unsupported(f"this adapter's task is {name}, which is not read from a text.",
                              next_step=f"an adapter trained for {', '.join(READ)}")  # fmt: skip
        return found.task

    def read(self, version: str, rows: Sequence[Row]) -> Future[list[Found]]:
        """Predictions of a version for rows with its task's columns (`text`, or `tokens`, or `source`).

        Raises UnknownVersion, Unsupported, BadOption (a column is missing), QueueFull.
        """
        task = self.task(version)
        for row in rows:
            for column in columns_of(task):
                if not row.get(column):
                    raise BadOption(f"a row for the task '{task.name}' lacks '{column}', or it is empty.",
                                    next_step=f"rows with {', '.join(columns_of(task))}")  # fmt: skip
        return self._ask(version, "read", rows, "auto")

    def embed(
        self, version: str | None, texts: Sequence[str | Sequence[int]], *, pooling: Pooling = "auto"
    ) -> Future[list[Found]]:
        """Vectors of unit length of texts, or of token ids.

        pooling: of the last states; "auto" is the last token of a decoder, else the mean.
        """
        rows = [{"text": t} if isinstance(t, str) else {"ids": list(t)} for t in texts]
        return self._ask(version, "embed", rows, pooling)

    def _ask(
        self, version: str | None, kind: str, rows: Sequence[Row], pooling: Pooling
    ) -> Future[list[Found]]:
        answer: Future[list[Found]] = Future()
        with self._news:
            if self._closing:
                raise Unsupported("the engine is closed.", next_step="open another")
            waiting = sum(len(j.left) for j in self._jobs)
            if waiting + len(rows) > self.queue_limit and waiting:
                raise QueueFull(waiting, 1.0)
            found = None if version is None else self._known(version)
            if found is not None:
                found.waiting += 1
                self._begin_reading(found)
            self._jobs.append(Job(found, kind, rows, answer, pooling, left=deque(range(len(rows)))))
            self._news.notify_all()
        return answer

    def feeder(self) -> tuple[Any, int]:
        """The base's tokenizer, and how many tokens it reads at once. Opens the base, if nothing was read yet."""
        with self._models:
            shell = self._shells.any()
            return shell.feeder, Task(max_length=1 << 30).longest(shell.feeder, shell.model)

    def stats(self) -> dict[str, Any]:
        with self._news:
            return {
                "waiting": sum(len(j.left) for j in self._jobs), "forwards": self.forwards, "rows": self.rows_read,
                "residents": {n: {"bytes": v.bytes} for n, v in self._attached.items()},
            }  # fmt: skip

    def close(self) -> None:
        """Fail what waits and end the thread."""
        with self._news:
            self._closing = True
            self._news.notify_all()
        self._thread.join()
        self._reader.shutdown(wait=True, cancel_futures=True)
        for job in self._jobs:
            fail(job, Unsupported("the engine was closed.", next_step="open another"))
