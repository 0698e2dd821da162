"""The reading engine: classes, numbers, tags, translations and embeddings from adapters behind one base.

One thread owns the models. Rows that wait while a forward runs go into the next one together, whoever asked for
them: the base runs once for all, with the adapter of each row, and each adapter's task reads its own rows' logits.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from veneer import engine
from veneer.errors import BadOption, Unsupported, nearest
from veneer.tasks import Task

from ._reading_rows import (
    Found,
    Job,
    Pooling,
    Row,
    Version,
    columns_of,
    encoded,
    fail,
    forward,
    is_ready,
    key_of,
    succeed,
)
from ._reading_shells import READ, Opener, Shell, Shells, fit, spec_opener
from ._reading_tasks import task_of
from ._registry_content import Content
from ._request import QueueFull, UnknownVersion


class ReadingEngine:
    """opener: opens the base for a task, as `spec_opener` does. batch_rows, batch_tokens: most of one forward, padding
    counted. memory_budget: bytes of attached adapters, None for no bound. queue_limit: rows that may wait.
    """

    def __init__(
        self, opener: Opener, *, batch_rows: int = 32, batch_tokens: int = 4096, memory_budget: int | None = None,
        queue_limit: int = 4096,
    ) -> None:  # fmt: skip
        self.batch_rows, self.batch_tokens = batch_rows, batch_tokens
        self.memory_budget, self.queue_limit = memory_budget, queue_limit
        self._shells = Shells(opener)
        self._versions: dict[str, Version] = {}
        self._attached: OrderedDict[str, Version] = OrderedDict()  # the one used longest ago first
        self._jobs: deque[Job] = deque()
        self._gone: list[Version] = []  # removed, and not yet taken off
        self._news = threading.Condition()
        self._models = threading.RLock()  # whoever touches a shell; never waited for while _news is held
        self._closing = False
        self.forwards = self.rows_read = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="veneer-reading-files")
        self._thread = threading.Thread(target=self._run, name="veneer-reading", daemon=True)
        self._thread.start()

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

    def _begin_reading(self, found: Version) -> None:
        """On a side thread; attaching it later reads nothing."""
        if found.shell is None and found.reading is None:
            found.reading = self._reader.submit(engine.read_adapter, found.folder)
            found.reading.add_done_callback(lambda _: self._wake())

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

    def _wake(self) -> None:
        with self._news:
            self._news.notify_all()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._news:
                self._settle()
                while not (self._closing or self._gone or any(is_ready(j) for j in self._jobs)):
                    self._news.wait()
                    self._settle()
                if self._closing:
                    return
            with self._models, torch.no_grad():
                with self._news:
                    gone, self._gone = self._gone, []
                    ready = [j for j in self._jobs if is_ready(j)]
                for found in gone:
                    self._detach(found)
                self._work(ready)

    def _settle(self) -> None:
        """Drop what is done or cancelled, and versions that nobody can ask for any more."""
        for job in [j for j in self._jobs if j.answer.done()]:
            self._jobs.remove(job)
            if job.version is not None:
                job.version.waiting -= 1
        for job in self._jobs:
            if job.version is not None:
                self._begin_reading(job.version)  # it made room for others since it was asked for
        for found in [v for v in self._versions.values() if v.leaving and not v.waiting]:
            self._gone.append(self._versions.pop(found.name))

    def _work(self, jobs: list[Job]) -> None:
        """One forward for the job that has waited longest and for all that can go with it."""
        group: list[Job] = []
        for job in jobs:
            if sum(len(j.left) for j in group) >= self.batch_rows:
                break
            if self._prepare(job, group) and (not group or self._key_of(job) == self._key_of(group[0])):
                group.append(job)
        if not group:
            return
        picked = self._pick(group)
        self._answer(picked)
        with self._news:
            for job in {id(j): j for j, _ in picked}.values():
                if len(job.found) == len(job.rows) and not job.answer.done():
                    succeed(job)
            # Whoever asked for many rows gives way to those who came later.
            for job in {id(j): j for j, _ in picked}.values():
                if job.left and job in self._jobs:
                    self._jobs.remove(job)
                    self._jobs.append(job)

    def _prepare(self, job: Job, group: Sequence[Job]) -> bool:
        """The adapter attached and the rows encoded; a failure is the job's own."""
        try:
            if job.version is not None:
                self._attach(job.version, {j.version.name for j in group if j.version})
            shell = self._shell_of(job)
            if job.features is None:
                job.features = encoded(job, shell)
            return True
        except Exception as error:
            fail(job, error)
            return False

    def _shell_of(self, job: Job) -> Shell:
        if job.version is None:
            return self._shells.any()
        assert job.version.shell is not None
        return job.version.shell

    def _key_of(self, job: Job) -> tuple[Any, ...]:
        return key_of(job, self._shell_of(job))

    def _attach(self, found: Version, in_use: set[str]) -> None:
        if found.shell is None:
            reading, found.reading = found.reading, None
            read = engine.read_adapter(found.folder) if reading is None else reading.result()
            found.shell = fit(self._shells, found.task, read, found.name)
            adapter = engine.adapters(found.shell.model)[found.name]
            found.bytes = sum(
                t.numel() * t.element_size() for t in [*adapter.parameters(), *adapter.buffers()]
            )
        self._attached[found.name] = found
        self._attached.move_to_end(found.name)
        while (
            self.memory_budget is not None
            and sum(v.bytes for v in self._attached.values()) > self.memory_budget
        ):
            idle = next((v for n, v in self._attached.items() if n != found.name and n not in in_use), None)
            if idle is None:
                return
            self._detach(idle)

    def _detach(self, found: Version) -> None:
        if found.shell is not None:
            engine.detach(found.shell.model, found.name)
        found.shell, found.bytes = None, 0
        self._attached.pop(found.name, None)

    def _pick(self, group: list[Job]) -> list[tuple[Job, int]]:
        """Rows of the group in turn, as many as one forward takes."""
        picked: list[tuple[Job, int]] = []
        longest = 0
        while len(picked) < self.batch_rows and any(j.left for j in group):
            for job in group:
                if not job.left or len(picked) >= self.batch_rows:
                    continue
                assert job.features is not None
                length = max(longest, job.features[job.left[0]]["length"])
                if picked and length * (len(picked) + 1) > self.batch_tokens:
                    return picked
                longest = length
                picked.append((job, job.left.popleft()))
        return picked

    def _answer(self, picked: list[tuple[Job, int]]) -> None:
        """Run rows together; where that fails, each job's alone, so that a request fails alone."""
        try:
            self._forward(picked)
        except Exception as error:
            jobs = list({id(j): j for j, _ in picked}.values())
            if len(jobs) == 1:
                fail(jobs[0], error)
                return
            for job in jobs:
                self._answer([(j, i) for j, i in picked if j is job])

    def _forward(self, picked: list[tuple[Job, int]]) -> None:
        picked = sorted(picked, key=lambda p: id(p[0].version))  # rows of one adapter next to one another
        found = forward(self._shell_of(picked[0][0]), picked)
        self.forwards += 1
        self.rows_read += len(picked)
        for (job, i), one in zip(picked, found):
            job.found[i] = one
