"""A member of a cohort that is stepped by hand: its loss, its update, and why it stopped."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import BadData, TrainingFailed
from veneer.training._job import Job
from veneer.training._own_loss import check_own_loss, own_loss, without_labels
from veneer.training._seeds import derived
from veneer.training.cohorts.seated import Seated


@dataclass
class Member:
    """One adapter of a cohort. steps: updates done by `Cohort.step`. error: why it stopped; None while it trains."""

    name: str
    job: Job
    learning_rate: float
    subject: Seated
    optimizer: Any
    seed: int = 0
    clip: float | None = 1.0
    loss: Any = None
    total_steps: int | None = None
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    steps: int = 0
    error: Exception | None = None
    _seen: bool = field(default=False, repr=False)

    @property
    def method(self) -> Any:
        return self.job.method

    @property
    def dropout_seed(self) -> int:
        return derived(self.seed, "dropout", self.steps, 0)

    def loss_of(self, model: nn.Module, batch: Any, kinds: set[Any]) -> Any:
        """The loss of a batch as a function of a model. kinds: of batches whose loss was seen to be the model's own."""
        if self.loss is not None:
            return lambda given: self.loss(given, batch)
        inputs, labels = without_labels(model, batch)

        def loss(given: Any) -> Tensor:
            return own_loss(model, given(**inputs), labels)

        kind = tuple(sorted(batch))
        if kind not in kinds:
            try:
                check_own_loss(model, batch, loss)
                kinds.add(kind)
            except (IndexError, RuntimeError, ValueError, BadData):
                pass  # a bad batch: the step says whose
        return loss

    def checked(self, value: Tensor | Exception) -> Tensor | None:
        """The loss to go backward from, penalties included; None, with the error, where the member stops."""
        if isinstance(value, Exception):
            self.error = value
            return None
        penalty = self.subject.penalty()
        value = value if penalty is None else value + penalty
        if bool(torch.isfinite(value).all()):
            return value
        self.error = self._not_finite("the loss")
        return None

    def update(self) -> None:
        """Clip, step and clear; the member stops where its gradient is not finite."""
        leaves = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        try:
            if not self._seen:
                self.subject.check_gradients()
                self._seen = True
            norm = torch.nn.utils.clip_grad_norm_(leaves, self.clip or math.inf)
            if not math.isfinite(float(norm)):
                self.error = self._not_finite("the gradient")
                return
            self.optimizer.step()
            self.steps += 1
            self.subject.between_steps(self.steps, self.total_steps or 0, self.optimizer)
        except Exception as error:
            self.error = error
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def _not_finite(self, what: str) -> TrainingFailed:
        return TrainingFailed(
            f"member '{self.name}': {what} is not finite at its step {self.steps}.",
            next_step=f"learning_rate={self.learning_rate / 10:.1g} for this member; then look at its rows",
        )
