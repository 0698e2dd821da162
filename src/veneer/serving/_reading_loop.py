"""The reading engine's thread: rows that wait while a forward runs go into the next one together.

The base runs once for all of them, with the adapter of each row; each adapter's task reads its own rows' logits.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from veneer import engine

from ._reading_rows import Job, Version, encoded, fail, forward, is_ready, key_of, succeed
from ._reading_shells import Opener, Shell, Shells, fit


class ReadingLoop:
    """What waits, and the thread that owns the models. `ReadingEngine` is its public side."""

    def __init__(
        self, opener: Opener, batch_rows: int, batch_tokens: int, memory_budget: int | None, queue_limit: int
    ) -> None:
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

    def _begin_reading(self, found: Version) -> None:
        """On a side thread; attaching it later reads nothing."""
        if found.shell is None and found.reading is None:
            found.reading = self._reader.submit(engine.read_adapter, found.folder)
            found.reading.add_done_callback(lambda _: self._wake())

    def _wake(self) -> None:
        with self._news:
            self._news.notify_all()

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
