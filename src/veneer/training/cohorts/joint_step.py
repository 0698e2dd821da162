"""One step of several runs at once: their losses by one forward, their gradients by one backward, an update each.

Everything beside the forward is the run's own: its rows, rate, schedule, penalties, hooks, clipping, optimizer, and
what it does between steps. A run that fails is taken out with its error, and the step goes on without it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.tasks import Batch
from veneer.training._loop import Run
from veneer.training._step import apply_gradients, fail, terms, update
from veneer.training.cohorts.shared_forward import shared_losses

Failed = Callable[[str, Exception], None]


def joint_step(model: nn.Module, runs: Mapping[str, Run], failed: Failed) -> None:
    """One step of every run. `failed(name, error)` is told of those that cannot go on."""
    going: dict[str, list[Batch]] = {}
    for name, run in runs.items():
        with _watched(name, model, failed):
            going[name] = run.begin_step()
    for name in [n for n in going if _needs_its_own(runs[n])]:
        with _watched(name, model, failed):
            _by_itself(runs[name], going.pop(name))
    shared = {name: runs[name] for name in going}
    began = time.perf_counter()
    losses = _gradients(model, shared, going, failed)
    took = time.perf_counter() - began
    rows = {name: sum(len(b.items) for b in going[name]) for name in losses}
    for name, loss in losses.items():
        with _watched(name, model, failed):
            start = time.perf_counter()
            apply_gradients(runs[name], going[name])
            own = time.perf_counter() - start + took * rows[name] / max(1, sum(rows.values()))
            runs[name].end_step(loss, going[name], own)


def _needs_its_own(run: Run) -> bool:
    """A step of another kind (its own hook, or a recipe without gradients) calls the model as it likes."""
    return bool(run.hooks.has["step"]) or getattr(run.recipe, "backward", True) is False


def _by_itself(run: Run, micro: list[Batch]) -> None:
    began = time.perf_counter()
    run.end_step(update(run, micro), micro, time.perf_counter() - began)


def _gradients(
    model: nn.Module, runs: Mapping[str, Run], batches: Mapping[str, list[Batch]], failed: Failed
) -> dict[str, float]:
    """{name: loss of the step} with every run's gradients in its leaves; runs without a finite loss are out."""
    whole = dict.fromkeys(runs, 0.0)
    for at in range(max((len(batches[n]) for n in runs), default=0)):
        parts = {n: batches[n][at] for n in whole if at < len(batches[n])}
        losses = _losses(model, {n: runs[n] for n in parts}, parts, batches, at)
        finite: dict[str, Tensor] = {}
        for name, value in losses.items():
            with _watched(name, model, failed):
                finite[name] = _checked(runs[name], value, batches[name], at)
        if finite:
            any_run = next(iter(runs.values()))
            any_run.accelerator.backward(torch.stack([v.float() for v in finite.values()]).sum())
        for name in parts:
            if name not in finite:
                del whole[name]
                runs[name].optimizer.zero_grad(set_to_none=True)
            else:
                whole[name] += float(finite[name].detach())
    return whole


def _losses(
    model: nn.Module,
    runs: Mapping[str, Run],
    parts: Mapping[str, Batch],
    batches: Mapping[str, list[Batch]],
    at: int,
) -> dict[str, Any]:
    """Each run's loss of its own part, weighted as in a step by itself."""

    def loss_of(name: str) -> Callable[[Any], Tensor]:
        run, batch = runs[name], parts[name]
        share = batch.weight / sum(b.weight for b in batches[name])
        return lambda model: run.task.loss(model, batch) * share

    if not runs:
        return {}
    first = next(iter(runs.values()))
    kept = {name: run.frozen.of(parts[name]) for name, run in runs.items()}
    seeds = {name: run.dropout_seed(at) for name, run in runs.items()}
    with first.accelerator.autocast():
        return shared_losses(model, {name: loss_of(name) for name in runs}, seeds, kept)


def _checked(run: Run, value: Any, micro: list[Batch], at: int) -> Tensor:
    """The loss with what is added to it once a step; raises where it is no finite number."""
    if isinstance(value, Exception):
        raise value
    for term in terms(run, micro[at]) if at == 0 else ():
        value = value + term
    if not math.isfinite(float(value.detach())):
        fail(run, "the loss", micro)
    return value


class _watched:
    """For one member: its adapter in the active place; an error is its own, and stops nobody else."""

    def __init__(self, name: str, model: nn.Module, failed: Failed) -> None:
        from veneer import engine

        self.name, self.failed, self.alone = name, failed, engine.alone(model, name)

    def __enter__(self) -> None:
        self.alone.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        self.alone.__exit__(None, None, None)
        if isinstance(error, Exception):
            self.failed(self.name, error)
            return True
        return False
