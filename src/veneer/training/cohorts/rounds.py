"""Runs of several adapters on one base, round by round: each with its own folder, data, schedule and end.

A round is one step of every run that is not done. Runs join between rounds, at whatever step their checkpoint says,
and leave when they are done or cannot go on. What a run writes is what `train` writes, so that either goes on with
what the other began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from veneer.errors import BadOption, Unsupported
from veneer.training import _open
from veneer.training._attach import checkpointed, statistics_data
from veneer.training._checkpoint import Checkpoints, locked
from veneer.training._evaluate import evaluating
from veneer.training._finish import finish, reset_peak
from veneer.training._kept import Kept
from veneer.training._loop import Run
from veneer.training._progress import Progress
from veneer.training._result import TrainResult
from veneer.training._seeds import own_randomness, seed_all
from veneer.training._train import fresh_of, go_on, opening_of
from veneer.training._wanted import Wanted
from veneer.training.cohorts.joint_step import joint_step
from veneer.training.cohorts.seated import Seated, seat

SAID = "trained in a cohort: the base's dropout is off, and step times are shares of joint steps"


@dataclass
class CohortResult:
    """results: of the members that were trained to their end; failed: why the others stopped."""

    results: dict[str, TrainResult] = field(default_factory=dict)
    failed: dict[str, Exception] = field(default_factory=dict)

    def __getitem__(self, name: str) -> TrainResult:
        return self.results[name]

    def to_dict(self) -> dict[str, Any]:
        return {
            "members": {name: found.to_dict() for name, found in self.results.items()},
            "failed": {name: str(error) for name, error in self.failed.items()},
        }

    def __str__(self) -> str:
        lines = [f"{name}: {found}" for name, found in self.results.items()]
        return "\n".join([*lines, *(f"{name}: stopped: {error}" for name, error in self.failed.items())])


@dataclass
class _Seat:
    """One run in its place. close: gives back its folder's lock and what else it holds."""

    wanted: Wanted
    run: Run
    notes: list[str]
    close: ExitStack
    brought: bool  # its adapter came with it, and goes with it where it fails


class Rounds:
    """Runs on one opened base. Used as a context, inside of which the base drops nothing."""

    def __init__(
        self,
        base: Any,
        device: Any = None,
        *,
        mixed_precision: str | None = None,
        gradient_checkpointing: bool = False,
        listener: Callable[[str], Progress] | None = None,
        heads: Callable[[int], dict[str, Tensor]] | None = None,
        keep: bool = True,
    ) -> None:
        """heads: values of the parameters that no file filled, by a member's seed. keep: adapters stay on the model."""
        from veneer import engine

        if mixed_precision == "fp16":
            raise Unsupported(
                "mixed_precision='fp16' scales the loss by one factor, which the members of a cohort would share.",
                next_step="mixed_precision='bf16'",
            )
        self.base, self.heads, self.keep = base, heads, keep
        self.accelerator = _open.accelerator_for(device, mixed_precision, False)
        self.shared = (mixed_precision, gradient_checkpointing)
        self.listener = listener or (lambda name: Progress())
        self.seats: dict[str, _Seat] = {}
        self.result = CohortResult()
        self._encoded: dict[Any, Any] = {}
        self._batches: dict[int, Any] = {}
        self.kept: Kept | None = None
        self._open = ExitStack()
        self._still = engine.is_still(base.model)

    @property
    def model(self) -> Any:
        return self.base.model

    def __enter__(self) -> Rounds:
        from veneer import engine

        self.model.to(self.accelerator.device)
        self._open.enter_context(own_randomness())
        self._open.enter_context(checkpointed(self.model, self.shared[1]))
        self._open.enter_context(engine.without_dropout(self.model))
        reset_peak(self.accelerator.device)
        return self

    def __exit__(self, *error: Any) -> None:
        for name in list(self.seats):
            self.leave(name, keep=self.keep and error[0] is None)
        self.model.eval()
        self._open.close()

    # -- who is in ---------------------------------------------------------------------------------

    def join(self, name: str, made: Wanted) -> None:
        """Let a run in. One that is finished already gives its result; one that cannot begin gives its error."""
        if name in self.seats or name in self.result.results:
            raise BadOption(f"a member is already called '{name}'.", next_step="choose another name")
        self._hold_shared(name, made)
        close = ExitStack()
        try:
            if made.folder is not None:
                close.enter_context(locked(made.folder))
                finished = made.finished()
                if finished is not None:
                    Checkpoints(made.folder).clear()
                    self.result.results[name] = finished
                    close.close()
                    return
            self.seats[name] = self._begin(name, made, close)
        except Exception as error:
            close.close()
            self.result.failed[name] = error

    def _hold_shared(self, name: str, made: Wanted) -> None:
        s = made.settings
        mine = (s.mixed_precision if s.mixed_precision != "no" else None, s.gradient_checkpointing)
        if mine != self.shared or (s.base_dropout and not self._still):
            raise BadOption(
                f"member '{name}' asks for mixed_precision={mine[0]!r}, gradient_checkpointing={mine[1]} and "
                f"base_dropout={s.base_dropout}, which are one for a cohort: {self.shared[0]!r}, {self.shared[1]} and "
                "False.",
                next_step="give them to the cohort, not to a member",
            )

    def _begin(self, name: str, made: Wanted, close: ExitStack) -> _Seat:
        """The run with its adapter on the model, at the step of its last checkpoint."""
        from veneer import engine

        job, task, s = made.job, made.task, made.settings
        if not job.is_trained:
            raise BadOption(
                f"member '{name}': the untrained base has nothing to train.",
                next_step="leave it out: its score needs no training",
            )
        if any(hasattr(hook, "exchange") for hook in made.hooks):
            raise Unsupported(
                f"member '{name}': a run that exchanges gradients trains by itself.",
                next_step="train it apart, with veneer.train",
            )
        feeder, recipe = _open.feeder_of(self.base, task), job.recipe()
        encoded, notes = self._encode(made, feeder)
        fresh, said = fresh_of(self.base)
        notes = [*self.base.notes, *notes, *said, SAID]
        progress = self.listener(name)
        for note in notes:
            progress.note(f"note: {note}")
        subject = Seated(self.model, name)
        brought = name not in engine.adapters(self.model)
        if brought:
            with evaluating(self.model), _heads(self.model, self.heads, s.seed):
                seed_all(s.seed, "attach")
                device = self.accelerator.device
                data = statistics_data(job, task, encoded["train"], feeder, self.model, device, notes)
                if data is not None:  # members that join together and begin alike are made from one pass
                    data = self._batches.setdefault(id(encoded), engine.Batches(data))
                seat(self.model, name, job, [*fresh, *made.whole], s.seed, made.members, data)
        try:
            engine.require_gradients(self.model, name)
            run = Run(
                subject, task, encoded, feeder, s, learning_rate=job.rate(s.learning_rate, recipe),
                accelerator=self.accelerator, recipe=recipe, hooks=made.hooks, method=job.method,
                checkpoints=None if made.folder is None else Checkpoints(made.folder), progress=progress,
            )  # fmt: skip
            if self.kept is None:
                self.kept = Kept(self.model, self.accelerator, s.frozen_prefix, s.frozen_prefix_bytes)
            run.frozen.tables = None if s.frozen_prefix == "off" else self.kept
            run.frozen.shares = True
            with engine.alone(self.model, name):
                go_on(run, progress)
                run.progress.begin(run.total_steps, run.step_now)
                run.start()
        except Exception:
            if brought:
                engine.detach(self.model, name)
            raise
        return _Seat(made, run, notes, close, brought)

    def _encode(self, made: Wanted, feeder: Any) -> Any:
        """The rows as the base reads them: once for all members with the same rows and task."""
        key = (made.rows.digest, repr(made.task), tuple(made.look_at))
        if key not in self._encoded:
            self._encoded[key] = _open.encode_splits(
                made.task, made.rows.splits, made.look_at, feeder, self.model
            )
        return self._encoded[key]

    # -- rounds ------------------------------------------------------------------------------------

    def round(self) -> bool:
        """One step of every run that is not done; False where none is left."""
        self._finish_those_done()
        self._batches.clear()  # what they keep is as large as the base
        if not self.seats:
            return False
        self.model.train()
        runs = {name: place.run for name, place in self.seats.items()}
        from veneer import engine

        for name, run in list(runs.items()):
            with engine.alone(self.model, name):
                run.turn_phase()
        stepped = {name: run.step_now for name, run in runs.items()}
        joint_step(self.model, runs, self._failed)
        for name, place in list(self.seats.items()):
            if place.run.step_now > stepped[name]:
                try:
                    with engine.alone(self.model, name):
                        place.run.after_step()
                except Exception as error:
                    self._failed(name, error)
        self._finish_those_done()
        return bool(self.seats)

    def _finish_those_done(self) -> None:
        from veneer import engine

        for name, place in [(n, s) for n, s in self.seats.items() if s.run.done]:
            run, made = place.run, place.wanted
            try:
                with engine.alone(self.model, name):
                    run.close()
                    run.take_best()
                    self.result.results[name] = finish(
                        run, self.base, made.job, made.rows, made.folder, place.notes, opening_of(made)
                    )
            except Exception as error:
                self._failed(name, error)
                continue
            self.leave(name, self.keep)

    def _failed(self, name: str, error: Exception) -> None:
        self.result.failed[name] = error
        self.seats[name].run.progress.note(f"stopped: {error}")
        self.leave(name, keep=not self.seats[name].brought)

    def leave(self, name: str, keep: bool = True) -> None:
        """Let a run go where it is; its last checkpoint stays. keep: its adapter stays on the model."""
        from veneer import engine

        place = self.seats.pop(name)
        place.run.progress.end()
        place.close.close()
        if not keep:
            engine.detach(self.model, name)


@contextmanager
def _heads(model: Any, heads: Callable[[int], dict[str, Tensor]] | None, seed: int) -> Iterator[None]:
    """The values that a base opened with this seed has where no file filled them, while an adapter copies them."""
    import torch

    values = heads(seed) if heads is not None else {}
    own = {n: p for n, p in model.named_parameters() if n in values}
    before = {n: p.detach().clone() for n, p in own.items()}
    with torch.no_grad():
        for n, p in own.items():
            p.copy_(values[n])
    try:
        yield
    finally:
        with torch.no_grad():
            for n, p in own.items():
                p.copy_(before[n])
