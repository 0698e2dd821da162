"""One run in slices, on a base that others use in between: after each slice the model is as it was before it.

A slice is a part of a step (`accumulate` cuts it), its update, or what comes before and behind the steps. Everything
random in a slice comes from the run's seed and the slice's place, so that it does not matter who ran in between.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.errors import BadOption
from veneer.tasks import Batch, Encoded
from veneer.training import _open
from veneer.training._attach import statistics_data
from veneer.training._checkpoint import Checkpoints, locked
from veneer.training._finish import finish
from veneer.training._loop import Run
from veneer.training._progress import Progress
from veneer.training._result import TrainResult
from veneer.training._seeds import own_randomness, seed_all
from veneer.training._step import apply_gradients, fail, terms, update
from veneer.training._train import STATE, fresh_of, opening_of
from veneer.training._wanted import Wanted
from veneer.training.cohorts.seated import seat


@dataclass(frozen=True)
class Slice:
    """What comes next. kind: begin, part, update, whole step, look, end. tokens: that it reads, filling included."""

    kind: str
    tokens: int = 0


@dataclass(frozen=True)
class Part(Slice):
    """A part of a step. Whoever computes it together with others' puts (loss, seconds) into `done`."""

    run: Any = None
    batch: Any = None
    at: int = 0
    share: float = 1.0  # of the step's rows
    done: list[tuple[float, float]] = field(default_factory=list)


class Sliced:
    """A run that another loop takes further, a slice at a time, on the thread that owns the model.

    base: opened, in evaluation mode. made: what `wanted` gave, with a folder. name: of the adapter while it is
    trained. save_seconds: between two checkpoints. `prepare()` may run on any thread; then each `next(slices())`
    does the slice that was told of before and tells of the next. `result` is there at the end.
    """

    def __init__(
        self,
        base: Any,
        made: Wanted,
        name: str,
        *,
        device: Any = None,
        progress: Progress | None = None,
        save_seconds: float = 60.0,
    ) -> None:
        if not made.job.is_trained or made.folder is None or made.members:
            raise BadOption(
                "a run in slices trains one adapter by itself, into a folder.",
                next_step="method='lora', output=DIR",
            )
        self.base, self.made, self.name, self.device = base, made, name, device
        self.progress, self.save_seconds = progress or Progress(), save_seconds
        self.result: TrainResult | None = None
        self.encoded: dict[str, Encoded] = {}
        self.notes: list[str] = []

    def prepare(self) -> None:
        """Rows to tokens: of training, and of validation where there are rows for it."""
        task, rows = self.made.task, self.made.rows.splits
        looks = ["validation"] if rows.get("validation") else []
        feeder = _open.feeder_of(self.base, task)
        self.encoded, self.notes = _open.encode_splits(task, rows, looks, feeder, self.base.model)

    def slices(self) -> Iterator[Slice]:
        """All slices, the first to the last. Closed early, the adapter is off again and the checkpoint stays."""
        folder = self.made.folder
        assert folder is not None
        yield Slice("begin")
        with ExitStack() as leaving:
            leaving.enter_context(locked(folder))
            self.result = self.made.finished()
            if self.result is not None:
                Checkpoints(folder).clear()
                return
            saves = leaving.enter_context(_Saves(Checkpoints(folder), self.save_seconds))
            run = self._begin()
            leaving.callback(self._take_off)
            self._restore(run, saves)
            try:
                yield from self._steps(run, saves)
            except GeneratorExit:  # asked to end: what was done so far is not done again
                saves.write(run, always=True)
                raise
            with self._turn(run, "end"):
                run.close()
            saves.wait()
            made = self.made
            notes = [*self.base.notes, *self.notes]
            self.result = finish(run, self.base, made.job, made.rows, folder, notes, opening_of(made))

    # -- begin -----------------------------------------------------------------------------------------------------

    def _begin(self) -> Run:
        """The run, with its adapter on the model and nobody's active."""
        from veneer import engine

        job, task, s, base = self.made.job, self.made.task, self.made.settings, self.base
        model, feeder, recipe = base.model, _open.feeder_of(base, task), job.recipe()
        accelerator = _open.accelerator_for(self.device, s.mixed_precision, False)
        fresh, said = fresh_of(base)
        self.notes += said
        self._still = engine.random_places(model)
        with own_randomness():
            seed_all(s.seed, "attach")
            data = statistics_data(
                job, task, self.encoded["train"], feeder, model, accelerator.device, self.notes
            )
            subject = seat(model, self.name, job, [*fresh, *self.made.whole], s.seed, None, data)
        try:
            engine.require_gradients(model, self.name)
            run = Run(
                subject, task, self.encoded, feeder, s, learning_rate=job.rate(s.learning_rate, recipe),
                accelerator=accelerator, recipe=recipe, hooks=self.made.hooks, method=job.method,
                progress=self.progress,
            )  # fmt: skip
        except BaseException:
            self._take_off()
            raise
        return run

    def _restore(self, run: Run, saves: _Saves) -> None:
        with self._turn(run, "begin"):
            saved = saves.checkpoints.last(*STATE)
            if saved is not None:
                run.restore(saved)
                self.progress.note(f"going on from step {run.step_now} of {run.total_steps}")
            self.progress.begin(run.total_steps, run.step_now)
            run.start()

    def _take_off(self) -> None:
        """The host stays, also where this was its only adapter: who else uses the base may hold it."""
        from veneer import engine

        host = engine.host_of(self.base.model)
        if self.name in host.names:
            host.drop(self.name)
        self.base.model.eval()
        self.progress.end()

    # -- steps -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self, run: Run, *place: str | int) -> Iterator[None]:
        """The model in training, this adapter alone active, what is random seeded; then all as it was."""
        from veneer import engine

        model = run.model
        with own_randomness(), engine.alone(model, self.name), engine.without_dropout(model, self._still):
            seed_all(run.settings.seed, *place)
            model.train()
            try:
                yield
            finally:
                model.eval()

    def _steps(self, run: Run, saves: _Saves) -> Iterator[Slice]:
        while not run.done:
            yield from self._step(run)
            ends_epoch = run.step_now % run.steps_an_epoch == 0
            if self.encoded.get("validation") and (ends_epoch or run.done):
                yield from self._look(run)
            if not run.done:
                saves.write(run, always=ends_epoch)
        yield Slice("end")

    def _step(self, run: Run) -> Iterator[Slice]:
        at = run.step_now
        with self._turn(run, "step", at, "begin"):
            run.turn_phase()
            micro = run.begin_step()
        began, spent = time.perf_counter(), 0.0
        if run.hooks.has["step"] or getattr(run.recipe, "backward", True) is False:
            yield Slice("whole step", sum(map(_tokens, micro)))
            with self._turn(run, "step", at):
                began = time.perf_counter()
                run.end_step(update(run, micro), micro, time.perf_counter() - began)
            return
        loss = 0.0
        total = sum(b.weight for b in micro)
        for part, batch in enumerate(micro):
            coming = Part("part", _tokens(batch), run, batch, part, batch.weight / total)
            yield coming
            if not coming.done:
                with self._turn(run, "step", at, part):
                    began = time.perf_counter()
                    found = _part(run, batch, part, coming.share)
                    coming.done.append((found, time.perf_counter() - began))
            loss, spent = loss + coming.done[0][0], spent + coming.done[0][1]
        yield Slice("update")
        with self._turn(run, "step", at, "update"):
            began = time.perf_counter()
            if not math.isfinite(loss):
                fail(run, "the loss", micro)
            apply_gradients(run, micro)
            run.end_step(loss, micro, spent + time.perf_counter() - began)

    def _look(self, run: Run) -> Iterator[Slice]:
        """The mean loss of the validation rows."""
        rows = self.encoded["validation"].features
        size = -(-run.settings.batch_size // max(1, run.settings.accumulate))
        summed = weight = 0.0
        for start in range(0, len(rows), size):
            batch = run.collate(rows[start : start + size])
            yield Slice("look", _tokens(batch))
            with self._turn(run, "look"), torch.no_grad():
                run.model.eval()
                summed += float(run.task.loss(run.model, batch)) * batch.weight
                weight += batch.weight
        self.progress.evaluated(run.step_now, "validation", {"loss": summed / max(weight, 1e-9)})


def _part(run: Run, batch: Batch, at: int, share: float) -> float:
    """Gradients of one part of a step are added up; its share of the loss."""
    with run.accelerator.autocast(), run.draws(at):
        loss = run.task.loss(run.model, batch) * share
    for term in terms(run, batch) if at == 0 else ():
        loss = loss + term
    if math.isfinite(float(loss.detach())):
        run.accelerator.backward(loss)
    return float(loss.detach())


def _tokens(batch: Batch) -> int:
    ids = batch.inputs.get("input_ids")
    return int(ids.numel()) if isinstance(ids, Tensor) else batch.tokens


class _Saves:
    """Checkpoints written on a side thread, so that a disk holds up nobody. At most one is under way."""

    def __init__(self, checkpoints: Checkpoints, seconds: float) -> None:
        self.checkpoints, self.seconds = checkpoints, seconds
        self._last = time.monotonic()
        self._writer = ThreadPoolExecutor(1, "veneer-checkpoint")
        self._writing: Future[Any] | None = None

    def __enter__(self) -> _Saves:
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.shutdown(wait=True)

    def write(self, run: Run, always: bool = False) -> None:
        if not always and time.monotonic() - self._last < self.seconds:
            return
        if not always and self._writing is not None and not self._writing.done():
            return  # the disk is slow: the next one will do
        self.wait()
        self._last = time.monotonic()
        self._writing = self._writer.submit(self.checkpoints.write, run.step_now, _still(run.state()))

    def wait(self) -> None:
        """Until what was begun is on the disk. Raises what stopped it."""
        if self._writing is not None:
            self._writing.result()


def _still(value: Any) -> Any:
    """A copy whose tensors do not change while they are written."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {k: _still(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return tuple(map(_still, value)) if isinstance(value, tuple) else list(map(_still, value))
    return value
