"""Training while serving: jobs on disk, several together on the engine's own base, in the time that requests leave.

A job's life is `validating_files`, `queued`, `running`, then `succeeded`, `failed` or `cancelled`. One thread leads
all of them; the steps themselves are slices that the engine's thread does (`_jobs_spare`). Whatever a kill interrupts
goes on at the next start: from the last checkpoint, or, where training had ended, with registering the same adapter
again.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import queue
import shutil
import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.bases import Base
from veneer.errors import BadOption, Unsupported, VeneerError, nearest
from veneer.training import Job as Arm
from veneer.training import Progress, Settings, Sliced, SlicedCohort, wanted

from ._jobs_files import Files, NotThere
from ._jobs_spare import Guard, Spare
from ._registry import Ready, Registry, check_name
from ._registry_engine import ready_on
from ._registry_jobs import Job, JobEvent, Jobs

KIND = "fine_tuning"
OPEN = ("validating_files", "queued", "running")
EVENTS = 200  # of losses, that a job writes at most
LOOK = 0.2  # seconds between two looks at a job that runs
log = logging.getLogger("veneer.serving")


@dataclass(frozen=True)
class Wish:
    """What a job is asked to do. suffix: the name that its adapter is served under. options: of the method.

    learning_rate_multiplier: of the method's own rate, where learning_rate is not given.
    """

    training_file: str
    validation_file: str | None = None
    method: str = "lora"
    options: Mapping[str, Any] = field(default_factory=dict)
    suffix: str | None = None
    epochs: float = 3
    batch_size: int = 8
    learning_rate: float | None = None
    learning_rate_multiplier: float = 1.0
    max_length: int | None = None
    seed: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)  # what the API shows again: its own form, metadata


@dataclass
class _Running:
    """A job that trains: what it says on the way, and the future that ends with its last slice."""

    job: Job
    sliced: Sliced
    told: _Told
    done: Future[None]


class FineTuning:
    """The jobs of a server. root: where files and checkpoints lie. ready: as `Registry.register` takes it.
    between_tokens: seconds, as for `Guard`. together: jobs that train at the same time, as members of one cohort.

    `start()` takes up what was left; `stop()` leaves it so that it can be taken up again.
    """

    def __init__(
        self,
        engine: Any,
        registry: Registry,
        root: Path | None = None,
        *,
        ready: Ready | None = None,
        between_tokens: float = 0.2,
        largest_file: int | None = None,
        save_seconds: float = 60.0,
        together: int = 4,
    ) -> None:
        self.engine, self.registry, self.save_seconds = engine, registry, save_seconds
        self.together = together
        self.root = Path(root or registry.root / "fine_tuning")
        self.table = Jobs(registry.tables)
        limits = {} if largest_file is None else {"largest": largest_file}
        self.files = Files(self.root / "files", self.table, **limits)
        self.ready = ready or ready_on(engine)
        self.cohort = SlicedCohort(getattr(engine, "model", None))
        self.spare = Spare(Guard(between_tokens), self.cohort, getattr(engine, "_wake", lambda: None))
        engine.spare = self.spare
        self._running: dict[str, _Running] = {}
        self.steps: Counter[str] = Counter()  # of each job, since this process began
        self._news, self._stopping = threading.Event(), False
        self._thread: threading.Thread | None = None

    # -- on any thread ---------------------------------------------------------------------------------------------

    def create(self, wish: Wish) -> Job:
        """A new job. Raises for what can be told at once: unknown files, methods, options, names."""
        if self.engine.tokenizer is None or not hasattr(self.engine, "model"):
            raise Unsupported(
                "this server's base writes no text, so that no conversation can be trained on.",
                next_step="veneer serve --model a language model with a tokenizer; or veneer train",
            )
        for file in (wish.training_file, wish.validation_file):
            if file is not None:
                self.files.get(file)
        if wish.suffix is not None:
            check_name(wish.suffix)
        rate = self._rate(wish)
        body = {**vars(wish), "options": dict(wish.options), "more": dict(wish.more), "rate": rate}
        made = self.table.create(KIND, body, state="validating_files", id=f"ftjob-{os.urandom(12).hex()}")
        self.say(made.id, f"Created fine-tuning job: {made.id}")
        self._news.set()
        return made

    def job(self, id: str) -> Job:
        known = [job.id for job in self.table.listed(KIND)]
        if id not in known:
            raise NotThere(
                f"there is no job '{id[:100]}'.", nearest=nearest(id, known),
                next_step="GET /v1/fine_tuning/jobs    lists all",
            )  # fmt: skip
        return self.table.job(id)

    def listed(self) -> list[Job]:
        """The newest first."""
        return list(reversed(self.table.listed(KIND)))

    def events(self, id: str) -> list[JobEvent]:
        """The newest first."""
        return list(reversed(self.table.events(self.job(id).id, limit=1_000_000)))

    def cancel(self, id: str) -> Job:
        """End a job that has not ended. Raises BadOption for one that has."""
        job = self.job(id)
        while job.state in OPEN:
            if self.table.update(id, state="cancelled", expected=job.state):
                self.say(id, "The job has been cancelled")
                if job.state != "running":
                    self._clean(job)
                self._news.set()
                break
            job = self.job(id)
        else:
            raise BadOption(f"job '{id}' has {job.state} already.", next_step="GET /v1/fine_tuning/jobs/ID")
        return self.job(id)

    def stats(self) -> dict[str, Any]:
        """What an operator looks at, as plain data. Of jobs: in the order in which they began here."""
        spare = self.spare
        return {
            "jobs": self.table.counts(KIND),
            "members": len(self.cohort),
            "steps": dict(self.steps),
            "tokens": {id: self.cohort.tokens[id] for id in list(self.steps)},
            "slices": dict(spare.slices),
            "recent": [seconds for _, seconds in list(spare.recent)],
            "seconds": dict(spare.seconds),
            "put_off": spare.put_off,
            "slack": spare.guard.slack,
        }

    def say(self, id: str, message: str, data: Mapping[str, Any] | None = None, level: str = "info") -> None:
        self.table.note(id, {"message": message, "level": level, "data": dict(data) if data else None})

    def start(self) -> None:
        for job in self.table.listed(KIND, "running"):
            self.table.update(job.id, state="queued", expected="running")
            self.say(job.id, "The server was started again: the job goes on from its last checkpoint")
        self._thread = threading.Thread(target=self._run, name="veneer-jobs", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._news.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> FineTuning:
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop()

    # -- the thread that leads -------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping and self.engine.alive:  # what is left is for the next start
            try:
                self._validate()
                self._take_on()
                for running in list(self._running.values()):
                    self._look(running)
            except Exception:  # a full disk, a locked table: tried again
                log.exception("jobs could not be looked at")
            waits = self._running or self.table.listed(KIND, "queued")
            self._news.wait(LOOK if self._running else 1.0 if waits else None)
            self._news.clear()
        for id in self._running:
            self.cohort.leave(id)
        self.spare.wake()
        if not self.engine.alive:  # nobody is left who would take them off
            self.cohort.close()
        for running in self._running.values():
            with contextlib.suppress(BaseException):
                running.done.result()
            self._tell(running)

    def _take_on(self) -> None:
        """Let waiting jobs in among those that train, while there is room."""
        while len(self._running) < self.together and (job := self.table.claim(KIND)) is not None:
            told = _Told()
            try:
                sliced = self._prepared(job, told)
            except Exception as error:
                self._ended_badly(job, error)
                continue
            self.say(job.id, "Fine-tuning job started")
            self.steps[job.id] += 0
            self._running[job.id] = _Running(job, sliced, told, self.cohort.join(sliced))
            self.spare.wake()

    def _look(self, running: _Running) -> None:
        """What a job has said becomes events; one that was cancelled is taken off, one that is done is served."""
        job = running.job
        ended = running.done.done()
        self._tell(running)
        if not ended:
            if self.table.job(job.id).state != "running":
                self.cohort.leave(job.id)
                self.spare.wake()
            return
        del self._running[job.id]
        try:
            running.done.result()
            if self.table.job(job.id).state == "running":  # and not cancelled in its last moments
                self._serve(job, running.sliced)
        except CancelledError:
            if self.table.job(job.id).state == "running":  # the engine ends: the next start goes on with it
                return
        except Exception as error:
            self._ended_badly(job, error)
        self._clean(job)

    def _validate(self) -> None:
        for job in self.table.listed(KIND, "validating_files"):
            try:
                splits = self.files.splits(job.body["training_file"], job.body["validation_file"])
            except VeneerError as error:
                self._fail(job, error, "validating_files")
                continue
            self.say(job.id, f"Files validated: {len(splits.train):,} conversations to train on")
            self.table.update(job.id, state="queued", expected="validating_files")

    def _prepared(self, job: Job, told: Progress) -> Sliced:
        body = job.body
        splits = self.files.splits(body["training_file"], body["validation_file"])
        model = self.engine.model
        # A tokenizer of its own: one may not be asked by two threads at once.
        tokenizer = copy.deepcopy(self.engine.tokenizer)
        name = self.engine.model_name
        base = Base(model, name, name, "transformers", tokenizer=tokenizer, processor=tokenizer)
        made = wanted(
            model=base, data=splits, method=body["method"], method_options=body["options"], output=self._folder(job),
            max_length=min(body["max_length"] or 512, self.engine.max_length), learning_rate=body["rate"],
            epochs=body["epochs"], batch_size=body["batch_size"], accumulate=body["batch_size"], seed=body["seed"],
            evaluate_on=(), frozen_prefix="off", base_dropout=False,
        )  # fmt: skip
        device = next(model.parameters()).device.type
        sliced = Sliced(base, made, job.id, device=device, progress=told, save_seconds=self.save_seconds)
        sliced.prepare()
        return sliced

    def _tell(self, running: _Running) -> None:
        found = []
        while not running.told.said.empty():
            message, data = running.told.said.get()
            found.append({"message": message, "level": "info", "data": data})
        self.steps[running.job.id] = running.told.steps
        if found:
            self.table.note(running.job.id, *found)

    def _serve(self, job: Job, sliced: Sliced) -> None:
        """Register the adapter, which answers from now on, and only then say that the job has succeeded."""
        name = job.body["suffix"] or f"ft-{job.id.removeprefix('ftjob-')}"
        assert sliced.result is not None
        version = self.registry.register(name, self._folder(job), trusted=True, ready=self.ready)
        result = sliced.result
        found = {
            "model": name,
            "version": version.digest,
            "tokens": result.trained_tokens,
            "steps": result.steps,
        }
        if self.table.update(job.id, state="succeeded", expected="running", body=found):
            self.say(job.id, f"New fine-tuned model created: {name}", {"version": f"sha256:{version.digest}"})
            self.say(job.id, "The job has successfully completed")

    def _ended_badly(self, job: Job, error: Exception) -> None:
        if not isinstance(error, VeneerError):
            log.error("job %s failed", job.id, exc_info=error)
        self._fail(job, error, "running")
        self._clean(job)

    def _fail(self, job: Job, error: Exception, expected: str) -> None:
        message = error.what if isinstance(error, VeneerError) else f"{type(error).__name__}: {error}"
        found = {"error": {"code": type(error).__name__, "message": message.replace(str(self.root), "")}}
        if self.table.update(job.id, state="failed", expected=expected, body=found):
            self.say(job.id, f"The job failed: {found['error']['message']}", level="error")

    def _clean(self, job: Job) -> None:
        shutil.rmtree(self._folder(job), ignore_errors=True)

    def _folder(self, job: Job) -> Path:
        return self.root / "runs" / job.id

    def _rate(self, wish: Wish) -> float:
        """The learning rate that a wish comes to; raises what is wrong with its method, and with its numbers."""
        arm = Arm(wish.method, dict(wish.options), None)
        if not arm.is_trained:
            raise BadOption("the untrained base has nothing to train.", next_step="method: lora")
        rate = arm.rate(wish.learning_rate, arm.recipe()) * (
            1.0 if wish.learning_rate is not None else wish.learning_rate_multiplier
        )
        Settings(learning_rate=rate, epochs=wish.epochs, batch_size=wish.batch_size, seed=wish.seed)
        return rate


class _Told(Progress):
    """Takes down, on the engine's thread, what the leading thread then writes: a disk holds up no step."""

    def __init__(self) -> None:
        self.said: queue.SimpleQueue[tuple[str, dict[str, Any] | None]] = queue.SimpleQueue()
        self.total = self.steps = 0

    def begin(self, total: int, done: int = 0) -> None:
        self.total = total

    def step(self, step: int, loss: float, rate: float, tokens_per_second: float) -> None:
        self.steps += 1
        every = max(1, self.total // EVENTS)
        if step % every == 0 or step == self.total:
            data = {"step": step, "total_steps": self.total, "train_loss": loss, "learning_rate": rate}
            self.said.put((f"Step {step}/{self.total}: training loss={loss:.4f}", data))

    def evaluated(self, step: int, split: str, metrics: dict[str, float]) -> None:
        data = {"step": step, "total_steps": self.total, "valid_loss": metrics["loss"]}
        self.said.put((f"Step {step}/{self.total}: validation loss={metrics['loss']:.4f}", data))

    def note(self, text: str) -> None:
        self.said.put((text, None))


__all__ = ["FineTuning", "Wish"]
