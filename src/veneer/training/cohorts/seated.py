"""An adapter that trains beside others: what reads the active adapters finds this one alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.training._job import Job
from veneer.training._seeds import derived
from veneer.training._subject import Adapted


class Seated(Adapted):
    """A member of a cohort, as the loop sees it."""

    def groups(self, learning_rate: float, weight_decay: float, recipe: Any = None) -> list[dict[str, Any]]:
        from veneer import engine

        with engine.alone(self.model, self.name):
            found = super().groups(learning_rate, weight_decay, recipe)
        engine.require_gradients(self.model, self.name)  # a recipe may have laid them out anew
        return found

    def prepare(self, total_steps: int) -> None:
        from veneer import engine

        with engine.alone(self.model, self.name):
            super().prepare(total_steps)

    def penalty(self) -> Tensor | None:
        from veneer import engine

        with engine.alone(self.model, self.name):
            return super().penalty()

    def between_steps(self, step: int, total_steps: int, optimizer: Any) -> str | None:
        from veneer import engine

        with engine.alone(self.model, self.name):
            return super().between_steps(step, total_steps, optimizer)

    def check_gradients(self) -> None:
        from veneer import engine

        with engine.alone(self.model, self.name):
            super().check_gradients()


def seat(
    model: nn.Module,
    name: str,
    job: Job,
    whole: Sequence[str],
    seed: int,
    members: Mapping[str, str | Path] | None = None,
    data: Any = None,
    **more: Any,
) -> Seated:
    """The member's adapter on the model, not active. It starts as `train` would start it from the same seed."""
    from veneer import engine

    for member, place in (members or {}).items():
        if member not in engine.adapters(model):
            engine.load(model, place, member, activate=False)
    given = {"whole": list(whole), "of": list(members or ()), "data": data, **more}
    options: dict[str, Any] = {k: v for k, v in given.items() if v}
    engine.attach(
        model, job.method, name=name, activate=False, seed=derived(seed, "attach") % 2**31, **options
    )
    return Seated(model, name)
