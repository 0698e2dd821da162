"""One step: the losses of its rows, their gradients, and the update; the same whoever takes part."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.tasks import Batch
from veneer.training._failures import first_not_finite, not_finite
from veneer.training._seeds import seed_all

if TYPE_CHECKING:
    from veneer.training._loop import Run


def update(run: Run, micro: list[Batch]) -> float:
    """Loss, gradients and one update. Returns the loss of the step, penalties included."""
    total = sum(b.weight for b in micro)

    def closure(backward: bool = True) -> Tensor:
        # The same draws at each call: what evaluates a step twice compares like with like.
        seed_all(run.settings.seed, "step", run.step_now)
        whole = torch.zeros((), device=run.device)
        for at, batch in enumerate(micro):
            with run.accelerator.autocast(), run.draws(at), run.frozen.behind(batch), run.flat.over(batch):
                loss = run.task.loss(run.model, batch) * (batch.weight / total)
            for term in terms(run, batch) if at == 0 else ():
                loss = loss + term
            if backward:
                run.accelerator.backward(loss)
            whole += loss.detach()
        return whole

    loss = run.hooks.step(run, closure, run.step_now)
    if loss is None:
        loss = _ordinary(run, closure, micro)
    value = float(loss)
    if not math.isfinite(value):
        fail(run, "the loss", micro)
    return value


def _ordinary(run: Run, closure: Any, micro: list[Batch]) -> Tensor:
    if getattr(run.recipe, "backward", True) is False:
        with torch.no_grad():
            return run.optimizer.step(lambda: closure(backward=False))
    loss = closure()
    if not math.isfinite(float(loss)):
        fail(run, "the loss", micro)  # before the update: what is trained stays finite
    apply_gradients(run, micro)
    return loss


def apply_gradients(run: Run, micro: list[Batch]) -> None:
    """The update that the gradients of a step ask for. Raises TrainingFailed where they are not finite."""
    if not run.checked:
        run.subject.check_gradients()
        run.checked = True
    if run.hooks.has["exchange"]:
        _exchange(run)
    scaler = getattr(run.accelerator, "scaler", None)
    if scaler is not None:
        scaler.unscale_(run.optimizer)
    run.hooks.on_gradients(run, run.step_now)
    trained = [p for g in run.optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(trained, run.settings.clip or math.inf)
    if scaler is not None:
        scaler.step(run.optimizer)
        scaler.update()
        return
    if not math.isfinite(float(norm)):
        fail(run, "the gradient", micro)
    run.optimizer.step()


def terms(run: Run, batch: Batch) -> list[Tensor]:
    """What is added to the loss once a step: the method's penalty, and what hooks add."""
    penalty = run.subject.penalty()
    found = [] if penalty is None else [penalty]
    return [*found, *run.hooks.loss_terms(run, batch).values()]


def _exchange(run: Run) -> None:
    trained = run.subject.parameters()
    sent = {str(i): p.grad for i, p in enumerate(trained) if p.grad is not None}
    for name, gradient in run.hooks.exchange(run, sent).items():
        trained[int(name)].grad = gradient


def fail(run: Run, what: str, micro: list[Batch]) -> None:
    """Raise the error of a step that diverged, with the module that overflowed first."""

    def again() -> None:
        seed_all(run.settings.seed, "step", run.step_now)
        for at, batch in enumerate(micro):
            with run.draws(at):
                run.task.loss(run.model, batch)

    rate = max(g["lr"] for g in run.optimizer.param_groups)
    items = [i for b in micro for i in b.items]
    raise not_finite(what, run.step_now, items, first_not_finite(run.model, again), rate, run.written)
