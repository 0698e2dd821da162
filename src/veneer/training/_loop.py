"""The loop: a step is rows, losses, gradients, an update; all that varies stands in hooks, tasks and recipes.

A `Run` is one training at one moment. Everything that decides its future is in `state()`, and everything
random in step k comes from (seed, k): so a run that was killed and resumed is the run that was not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from veneer.engine import dropout_seeds, without_dropout
from veneer.errors import TrainingFailed
from veneer.tasks import Batch, Encoded, Task
from veneer.training._batches import Plan, parts
from veneer.training._checkpoint import Checkpoints, to_device
from veneer.training._evaluate import predictions_of
from veneer.training._failures import out_of_memory
from veneer.training._flat import FlatTokens
from veneer.training._frozen import ROWS, FrozenPart
from veneer.training._offload import offload
from veneer.training._optimizer import load_optimizer, make_optimizer, optimizer_state, views_of
from veneer.training._progress import Progress
from veneer.training._schedule import rate_factor, set_rates, warmup_steps
from veneer.training._seeds import derived, own_randomness, seed_all
from veneer.training._settings import Settings
from veneer.training._step import update
from veneer.training._subject import Subject
from veneer.training._time import TimeLimit
from veneer.training.hooks import AllHooks, Phase, carry_state, forget_state

KEPT_IN_HISTORY = 400  # losses that the history keeps, evenly spread
SAVED_AT_LEAST_EVERY = 600  # seconds, where nobody says how often


class Run:
    """One training. Hooks are given it: `model`, `subject`, `optimizer`, `step_now`, `batches`, `forget`."""

    def __init__(
        self,
        subject: Subject,
        task: Task,
        encoded: Mapping[str, Encoded],
        feeder: Any,
        settings: Settings,
        *,
        learning_rate: float,
        accelerator: Any,
        recipe: Any = None,
        hooks: Sequence[Any] = (),
        method: Any = None,
        checkpoints: Checkpoints | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.subject, self.task, self.encoded, self.feeder = subject, task, encoded, feeder
        self.settings, self.learning_rate, self.accelerator = settings, learning_rate, accelerator
        self.recipe, self.checkpoints = recipe, checkpoints
        limit = None if settings.max_seconds is None else TimeLimit(settings.max_seconds)
        self.hooks = AllHooks([*hooks, recipe, limit], methods=[method])
        self.progress = progress or Progress()
        self.rows = encoded["train"].features
        self.plan = Plan(self.rows, settings)
        self.steps_an_epoch, self.total_steps = self.plan.steps_an_epoch, self.plan.total_steps
        self.warmup = warmup_steps(settings.warmup, self.total_steps)
        self.step_now, self.seconds, self.tokens, self.began = 0, 0.0, 0, 0.0
        self.step_seconds: list[float] = []
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.stopped = False
        self.phase = -1
        self._stages: list[tuple[float, Phase]] = []
        self.written: str | None = None
        self.notes: list[str] = []  # what to say beside the result
        self.frozen, self.flat = FrozenPart(self), FlatTokens(self)
        self.checked, self._saved = False, time.monotonic()
        self.optimizer = self._make_optimizer()

    @property
    def model(self) -> nn.Module:
        return self.subject.model

    @property
    def device(self) -> Any:
        return self.accelerator.device

    # -- state -------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that decides what comes next, as a checkpoint holds it."""
        position = {
            "step": self.step_now, "phase": self.phase, "seconds": self.seconds, "tokens": self.tokens,
            "step_seconds": self.step_seconds[-200:], "history": self.history, "best": self.best,
            "stopped": self.stopped, "settings": self.settings.decides(),
            "groups": len(self.optimizer.param_groups), "flat": self.flat.why_not,
        }  # fmt: skip
        own = {n: v.state_dict() for n, v in (("recipe", self.recipe),) if hasattr(v, "state_dict")}
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            own["scaler"] = scaler.state_dict()
        return {
            "adapter": self.subject.state(), "optimizer": optimizer_state(self.optimizer), "own": own,
            "position": position,
        }  # fmt: skip

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on where `state()` was taken."""
        position = saved["position"]
        self.subject.restore(to_device(saved["adapter"], self.device))
        self.optimizer = self._make_optimizer()
        load_optimizer(self.optimizer, to_device(saved["optimizer"], self.device))
        if self._offloaded is not None:
            self._offloaded.take()
        for name, value in saved["own"].items():
            owner = self.recipe if name == "recipe" else self.accelerator.scaler
            owner.load_state_dict(value)
        self.step_now, self.phase = position["step"], position["phase"]
        self.seconds, self.tokens, self.step_seconds = (
            position["seconds"], position["tokens"], list(position["step_seconds"]),
        )  # fmt: skip
        self.flat.why_not = position.get("flat", self.flat.why_not)
        self.history, self.best, self.stopped = position["history"], position["best"], position["stopped"]

    def _make_optimizer(self) -> Any:
        groups = self.subject.groups(self.learning_rate, self.settings.weight_decay, self.recipe)
        self._views = views_of(groups)
        made = make_optimizer(groups, self.recipe, self.learning_rate, self.settings.weight_decay)
        self._offloaded = offload(made, self.settings.offload_optimizer)
        return made

    def forget(self, parameter: Tensor, index: Tensor | None = None) -> None:
        """Drop the optimizer's state of a parameter, or of some of its entries."""
        forget_state(self.optimizer, parameter, index)

    def rebuild_optimizer(self, keep: bool = True) -> None:
        """A new optimizer over the parameters of now; `keep` moves the state of those that stay."""
        old, views = self.optimizer, self._views
        self.optimizer = self._make_optimizer()
        if keep:
            carry_state(old, self.optimizer, views, self._views)

    # -- rows --------------------------------------------------------------------------------------

    def rows_of(self, step: int) -> list[dict[str, Any]]:
        """The features that step `step` trains on."""
        return [self.rows[i] for i in self.plan.indices(step)]

    def _hold_trained(self) -> None:
        """The optimizer updates what the adapter trains: asked at every epoch, since it fails silently."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missed = sum(id(p) not in held for p in self.subject.parameters())
        if missed:
            raise TrainingFailed(
                f"at step {self.step_now} the optimizer no longer holds {missed} of the adapter's "
                "parameters.",
                next_step='a hook that changes them returns "groups_changed" from between_steps',
            )

    def batches(self, split: str = "train", batch_size: int = 16, limit: int | None = None) -> list[Batch]:
        """The first rows of a split in batches, for hooks that read data (a Fisher pass, a start from
        data).
        """
        rows = self.encoded[split].features[:limit]
        return [self.collate(rows[at : at + batch_size]) for at in range(0, len(rows), batch_size)]

    def part_of(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """A part of a step, which remembers its rows: what is kept of them is found by them."""
        batch = self.collate(rows)
        batch.extra = {**batch.extra, ROWS: rows}
        return batch

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return self.task.collate(rows, self.feeder, self.model).to(self.device)

    # -- the loop ----------------------------------------------------------------------------------

    def train(self) -> None:
        """All steps that are left."""
        self.progress.begin(self.total_steps, self.step_now)
        self.model.train()
        try:
            with own_randomness(), self._dropout():
                self.start()
                while not self.done:
                    self.turn_phase()
                    self._one_step()
                    self.after_step()
                self.close()
        finally:
            self.progress.end()
            self.model.eval()

    @property
    def done(self) -> bool:
        return self.step_now >= self.total_steps or self.stopped

    def start(self) -> None:
        """What comes before the first of the steps that are left."""
        self.subject.prepare(self.total_steps)
        self._stages = self._phases()
        if self.step_now == 0:
            seed_all(self.settings.seed, "begin")
            self._changed(self.hooks.between_steps(self, 0))

    def close(self) -> None:
        """What comes behind the last step."""
        if self._stages and self.phase >= 0 and not self.stopped:
            self._leave()

    def _dropout(self) -> Any:
        return nullcontext() if self.settings.base_dropout else without_dropout(self.model)

    def dropout_seed(self, at: int) -> int:
        """Of what the adapter drops in the `at`-th part of this step."""
        return derived(self.settings.seed, "dropout", self.step_now, at)

    def draws(self, at: int) -> Any:
        """A context in which the adapter's dropout is drawn from the run's own seed."""
        name = getattr(self.subject, "name", None)
        return nullcontext() if name is None else dropout_seeds(self.model, {name: self.dropout_seed(at)})

    def begin_step(self) -> list[Batch]:
        """The parts of this step's batch, with the learning rates set."""
        if self.step_now % self.steps_an_epoch == 0:
            self._hold_trained()
        rows = self.rows_of(self.step_now)
        micro = [self.part_of(part) for part in parts(rows, self.settings.accumulate)]
        set_rates(
            self.optimizer, rate_factor(self.settings.schedule, self.step_now, self.total_steps, self.warmup)
        )
        return micro

    def end_step(self, loss: float, micro: Sequence[Batch], took: float) -> None:
        """What comes behind an update; took: its seconds until now."""
        self.began = time.perf_counter() - took
        self.step_now += 1
        self._changed(self.subject.between_steps(self.step_now, self.total_steps, self.optimizer))
        self._changed(self.hooks.between_steps(self, self.step_now))
        self.optimizer.zero_grad(set_to_none=True)
        took = time.perf_counter() - self.began
        self.seconds += took
        self.step_seconds.append(took)
        self.tokens += sum(b.tokens for b in micro)
        self._note(loss)

    def _one_step(self) -> None:
        began = time.perf_counter()
        micro = self.begin_step()
        try:
            loss = update(self, micro)
        except torch.OutOfMemoryError as error:
            longest = max(f["length"] for f in self.rows_of(self.step_now))
            s = self.settings
            raise out_of_memory(
                error, self.step_now, s.batch_size, s.accumulate, longest, s.gradient_checkpointing
            ) from error
        self.end_step(loss, micro, time.perf_counter() - began)

    def _changed(self, change: str | None) -> None:
        if change == "groups_changed":
            self.rebuild_optimizer()

    # -- phases ------------------------------------------------------------------------------------

    def _phases(self) -> list[tuple[float, Phase]]:
        """(part of the steps before it, phase), the shares brought to one."""
        phases = self.hooks.phases(self)
        whole, before, found = sum(p.share for p in phases), 0.0, []
        for phase in phases:
            found.append((before / whole, phase))
            before += phase.share
        return found

    def turn_phase(self) -> None:
        """Enter the stage that the next step belongs to."""
        phases = self._stages
        while self.phase + 1 < len(phases) and self.step_now >= round(
            self.total_steps * phases[self.phase + 1][0]
        ):
            if self.phase >= 0:
                self._leave()
            self.phase += 1
            phase = phases[self.phase][1]
            if phase.enter is not None:
                seed_all(self.settings.seed, "phase", self.phase)
                phase.enter(self)
            if phase.optimizer == "rebuild":
                self.rebuild_optimizer(keep=False)

    def _leave(self) -> None:
        leave = self._stages[self.phase][1].exit
        if leave is not None:
            leave(self)

    # -- behind a step -----------------------------------------------------------------------------

    def _note(self, loss: float) -> None:
        rate = self.optimizer.param_groups[0]["lr"]
        every = max(1, self.total_steps // KEPT_IN_HISTORY)
        if self.step_now % every == 0 or self.step_now == self.total_steps:
            self.history.append({"step": self.step_now, "loss": loss, "learning_rate": rate})
        self.progress.step(self.step_now, loss, rate, self.tokens / max(self.seconds, 1e-9))

    def after_step(self) -> None:
        """Look at the validation rows and write a checkpoint, where it is time."""
        s, at_end = self.settings, self.step_now == self.total_steps
        ends_epoch = self.step_now % self.steps_an_epoch == 0
        by_epoch = s.evaluate_every is None and s.early_stopping is not None and (ends_epoch or at_end)
        by_step = s.evaluate_every is not None and (self.step_now % s.evaluate_every == 0 or at_end)
        if by_epoch or by_step:
            self._look()
        long_ago = time.monotonic() - self._saved > SAVED_AT_LEAST_EVERY
        saves = self.step_now % s.save_every == 0 if s.save_every else ends_epoch or long_ago
        if self.checkpoints is not None and (saves or at_end or self.stopped):
            self.written = str(self.checkpoints.write(self.step_now, self.state()))
            self._saved = time.monotonic()

    def _look(self) -> None:
        """Evaluate on the validation rows, and stop where nothing got better for too long."""
        if not self.encoded.get("validation"):
            return
        metrics = self.task.metrics(self.predictions("validation"))
        self.model.train()
        name = self.task.primary_metric
        value = metrics[name]
        self.history.append({"step": self.step_now, "split": "validation", **metrics})
        self.progress.evaluated(self.step_now, "validation", {name: value})
        if self.settings.early_stopping is None:
            return
        sign = 1 if self.task.greater_is_better else -1
        if not self.best or sign * value > sign * self.best["value"]:
            self.best = {"step": self.step_now, "value": value, "metric": name, "waited": 0}
            if self.checkpoints is not None:
                self.checkpoints.write_best(self.subject.state())
            else:
                self._best_state = self.subject.state()
        else:
            self.best["waited"] += 1
            self.stopped = self.best["waited"] >= self.settings.early_stopping

    def take_best(self) -> None:
        """Put the best state that early stopping kept back into the adapter."""
        if not self.best:
            return
        state = self.checkpoints.best() if self.checkpoints is not None else self._best_state
        if state is not None:
            self.subject.restore(to_device(state, self.device))

    def predictions(self, split: str) -> list[dict[str, Any]]:
        """Of every row of a split, in order."""
        with own_randomness():
            return predictions_of(
                self.model, self.task, self.encoded[split], self.feeder,
                batch_size=self.settings.evaluate_batch_size, device=self.device,
                autocast=self.accelerator.autocast, seed=self.settings.seed, around=self.frozen.around(split),
            )  # fmt: skip

    @property
    def median_step_seconds(self) -> float:
        return statistics.median(self.step_seconds) if self.step_seconds else 0.0
