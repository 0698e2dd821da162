"""The reading engine: classes, numbers, tags, translations and embeddings from adapters behind one base.

One thread owns the models. Rows that wait while a forward runs go into the next one together, whoever asked for
them: the base runs once for all, with the adapter of each row, and each adapter's task reads its own rows' logits.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from veneer import engine
from veneer.engine._store import Read
from veneer.errors import BadOption, Unsupported, VeneerError, nearest
from veneer.tasks import Task, task_from_dict
from veneer.tasks._collate import takes, text_inputs
from veneer.tasks._text import logits_of
from veneer.training._evaluate import evaluating

from ._reading_shells import READ, Opener, Shell, Shells, fit, spec_opener
from ._registry_content import Content
from ._request import QueueFull, UnknownVersion

Pooling = Literal["auto", "mean", "cls", "last"]
Row = Mapping[str, Any]


@dataclass
class _Version:
    name: str
    folder: Path
    task: Task | None
    reading: Future[Read] | None = None
    shell: Shell | None = None
    bytes: int = 0
    waiting: int = 0  # jobs that have not ended
    leaving: bool = False


@dataclass
class _Job:
    """What one caller asked: some rows of one version."""

    version: _Version | None
    kind: str  # "read" or "embed"
    rows: Sequence[Row]
    answer: Future[list[Any]]
    pooling: Pooling = "auto"
    features: list[dict[str, Any]] | None = None
    left: deque[int] = field(default_factory=deque)  # rows that have not been in a batch
    found: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """A row's answer: a task's prediction, as `veneer.predict` gives it, or a vector; and the tokens that were read."""

    tokens: int
    prediction: Mapping[str, Any] | None = None
    vector: tuple[float, ...] = ()


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
        self._versions: dict[str, _Version] = {}
        self._attached: OrderedDict[str, _Version] = OrderedDict()  # the one used longest ago first
        self._jobs: deque[_Job] = deque()
        self._gone: list[_Version] = []  # removed, and not yet taken off
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
        made = _Version(version, folder, task_of(folder))
        with self._news:
            there = self._versions.get(version)
            if there is not None and not there.leaving:
                raise BadOption(f"version '{version}' is known already; a version never changes.")
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

    def _known(self, version: str) -> _Version:
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
            for column in _columns(task):
                if not row.get(column):
                    raise BadOption(f"a row for the task '{task.name}' lacks '{column}', or it is empty.",
                                    next_step=f"rows with {', '.join(_columns(task))}")  # fmt: skip
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
            self._jobs.append(_Job(found, kind, rows, answer, pooling, left=deque(range(len(rows)))))
            self._news.notify_all()
        return answer

    def _begin_reading(self, found: _Version) -> None:
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
            _fail(job, Unsupported("the engine was closed.", next_step="open another"))

    def _wake(self) -> None:
        with self._news:
            self._news.notify_all()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._news:
                self._settle()
                while not (self._closing or self._gone or any(_is_ready(j) for j in self._jobs)):
                    self._news.wait()
                    self._settle()
                if self._closing:
                    return
            with self._models, torch.no_grad():
                with self._news:
                    gone, self._gone = self._gone, []
                    ready = [j for j in self._jobs if _is_ready(j)]
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

    def _work(self, jobs: list[_Job]) -> None:
        """One forward for the job that has waited longest and for all that can go with it."""
        group: list[_Job] = []
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
                    _succeed(job)
            # Whoever asked for many rows gives way to those who came later.
            for job in {id(j): j for j, _ in picked}.values():
                if job.left and job in self._jobs:
                    self._jobs.remove(job)
                    self._jobs.append(job)

    def _prepare(self, job: _Job, group: Sequence[_Job]) -> bool:
        """The adapter attached and the rows encoded; a failure is the job's own."""
        try:
            if job.version is not None:
                self._attach(job.version, {j.version.name for j in group if j.version})
            shell = self._shell_of(job)
            if job.features is None:
                job.features = _encoded(job, shell)
            return True
        except Exception as error:
            _fail(job, error)
            return False

    def _shell_of(self, job: _Job) -> Shell:
        if job.version is None:
            return self._shells.any()
        assert job.version.shell is not None
        return job.version.shell

    def _key_of(self, job: _Job) -> tuple[Any, ...]:
        return _key(job, self._shell_of(job))

    def _attach(self, found: _Version, in_use: set[str]) -> None:
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

    def _detach(self, found: _Version) -> None:
        if found.shell is not None:
            engine.detach(found.shell.model, found.name)
        found.shell, found.bytes = None, 0
        self._attached.pop(found.name, None)

    def _pick(self, group: list[_Job]) -> list[tuple[_Job, int]]:
        """Rows of the group in turn, as many as one forward takes."""
        picked: list[tuple[_Job, int]] = []
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

    def _answer(self, picked: list[tuple[_Job, int]]) -> None:
        """Run rows together; where that fails, each job's alone, so that a request fails alone."""
        try:
            self._forward(picked)
        except Exception as error:
            jobs = list({id(j): j for j, _ in picked}.values())
            if len(jobs) == 1:
                _fail(jobs[0], error)
                return
            for job in jobs:
                self._answer([(j, i) for j, i in picked if j is job])

    def _forward(self, picked: list[tuple[_Job, int]]) -> None:
        picked = sorted(picked, key=lambda p: id(p[0].version))  # rows of one adapter next to one another
        first = picked[0][0]
        shell = self._shell_of(first)
        features = [_feature(j, i) for j, i in picked]
        names = [None if j.version is None else j.version.name for j, _ in picked]
        with evaluating(shell.model), _rows(shell, names):
            if first.kind == "embed":
                found: list[Any] = _embedded(shell, features, first.pooling)
            elif _generates(first):
                found = first.version.task.generate(shell.model, _collated(first, features, shell))  # type: ignore[union-attr]
                found = [{"prediction": text} for text in found]
            else:
                found = _predicted(shell, picked, features)
        self.forwards += 1
        self.rows_read += len(picked)
        for (job, i), one, feature in zip(picked, found, features):
            tokens = int(feature["length"])
            job.found[i] = (
                Found(tokens, vector=tuple(one.tolist())) if isinstance(one, Tensor) else Found(tokens, one)
            )


def _predicted(shell: Shell, picked: Sequence[tuple[_Job, int]], features: list[dict[str, Any]]) -> list[Any]:
    """The base once for all rows; then each task reads its own rows of the logits, and its own labels of them."""
    device = next(shell.model.parameters()).device
    inputs = {k: v.to(device) for k, v in text_inputs(features, shell.feeder, shell.model).items()}

    class _Inputs:
        pass

    given: Any = _Inputs()
    given.inputs = inputs
    logits = logits_of(shell.model, given)
    found: list[Any] = [None] * len(picked)
    jobs = {id(j): j for j, _ in picked}
    for key, job in jobs.items():
        task = job.version.task  # type: ignore[union-attr]
        assert task is not None
        mine = [at for at, (j, _) in enumerate(picked) if id(j) == key]
        batch = _collated(job, [features[at] for at in mine], shell)
        own = logits[mine][..., : task.num_labels or 1]
        if own.dim() == 3:
            own = own[:, : batch.inputs["input_ids"].shape[1]]
        for at, one in zip(mine, task.predict(_Said(own), batch)):
            found[at] = one
    return found


class _Said(torch.nn.Module):
    """Stands for a model whose logits are known."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **inputs: Any) -> Tensor:
        return self.logits


def _embedded(shell: Shell, features: list[dict[str, Any]], pooling: Pooling) -> list[Tensor]:
    """Unit vectors, (width,) each, of the states before the head."""
    facts = engine.read(shell.model).facts
    if facts.encoder_decoder:
        raise Unsupported(
            "embeddings of an encoder-decoder are not made.", next_step="an encoder or a decoder"
        )
    device = next(shell.model.parameters()).device
    inputs = {k: v.to(device) for k, v in text_inputs(features, shell.feeder, shell.model).items()}
    states = shell.body(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"]
    how = pooling if pooling != "auto" else "last" if facts.causal else "mean"
    if how == "mean":
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    elif how == "cls":
        pooled = states[:, 0]
    else:
        pooled = states[torch.arange(len(features)), mask.sum(1) - 1]
    return list(torch.nn.functional.normalize(pooled, dim=-1).cpu())


@contextlib.contextmanager
def _rows(shell: Shell, names: list[str | None]) -> Iterator[None]:
    if all(n is None for n in names) and not engine.adapters(shell.model):
        yield
        return
    with engine.rows(shell.model, names):
        yield


def _feature(job: _Job, i: int) -> dict[str, Any]:
    assert job.features is not None
    return job.features[i]


def _collated(job: _Job, features: list[dict[str, Any]], shell: Shell) -> Any:
    task = job.version.task  # type: ignore[union-attr]
    assert task is not None
    return task.collate(features, shell.feeder, shell.model).to(next(shell.model.parameters()).device)


def _encoded(job: _Job, shell: Shell) -> list[dict[str, Any]]:
    if job.kind == "read":
        return job.version.task.encode(job.rows, shell.feeder, shell.model).features  # type: ignore[union-attr]
    longest = Task(max_length=1 << 30).longest(shell.feeder, shell.model)
    typed, features = takes(shell.model, "token_type_ids"), []
    for row in job.rows:
        encoded: Any = {"input_ids": row.get("ids", [])[:longest]}
        if "ids" not in row:
            encoded = shell.feeder(row["text"], truncation=True, max_length=longest)
        _check_ids(encoded["input_ids"], len(shell.feeder))
        feature = {"input_ids": encoded["input_ids"], "length": len(encoded["input_ids"])}
        if typed:
            feature["token_type_ids"] = encoded.get("token_type_ids", [0] * feature["length"])
        features.append(feature)
    return features


def _check_ids(ids: Sequence[int], known: int) -> None:
    if not ids or not all(0 <= i < known for i in ids):
        raise BadOption(f"an input has no token, or one outside of the {known:,} that this base knows.",
                        next_step="a text with words, or ids from /tokenize")  # fmt: skip


def _generates(job: _Job) -> bool:
    return (
        job.kind == "read"
        and job.version is not None
        and bool(job.version.task and job.version.task.generates)
    )


def _key(job: _Job, shell: Shell) -> tuple[Any, ...]:
    """What rows of one forward have in common."""
    if _generates(job):
        task: Any = job.version.task  # type: ignore[union-attr]
        return id(shell), "generate", task.max_target_length, task.beams
    return id(shell), job.kind, job.pooling


def _is_ready(job: _Job) -> bool:
    """Its file has been read, and rows are left."""
    found = job.version
    waits = (
        found is not None and found.shell is None and found.reading is not None and not found.reading.done()
    )
    return bool(job.left) and not waits and not job.answer.done()


def _columns(task: Task) -> tuple[str, ...]:
    if task.name == "rank":
        return ("query", "document")
    return {"tag": ("tokens",), "seq2seq": ("source",)}.get(task.name, ("text",))


def task_of(folder: Path) -> Task | None:
    """The task that a folder says its adapter was trained for."""
    if not (folder / "veneer.json").is_file():
        return None
    saved = engine.read_record(folder).get("task")
    return task_from_dict(saved) if isinstance(saved, Mapping) and "name" in saved else None


def _fail(job: _Job, error: Exception) -> None:
    with contextlib.suppress(Exception):
        job.answer.set_exception(error)
    job.left.clear()


def _succeed(job: _Job) -> None:
    with contextlib.suppress(Exception):
        job.answer.set_result([job.found[i] for i in range(len(job.rows))])


__all__ = ["Found", "Pooling", "ReadingEngine", "VeneerError"]
