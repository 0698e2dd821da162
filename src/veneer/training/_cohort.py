"""`Cohort`: several adapters trained together over one frozen base, one forward and one backward for all.

The base is the cost, adapters are small. Each member has its own method, learning rate, seed, optimizer and clipping;
a step gives each a batch of its own and each its own loss, whose gradients are those of separate training. A member
whose loss is not finite, or whose batch is wrong, stops; the others go on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import BadOption, TrainingFailed, UnknownName, UnknownOption, nearest
from veneer.training._job import Job
from veneer.training._optimizer import make_optimizer
from veneer.training._own_loss import check_own_loss, own_loss, without_labels
from veneer.training._seeds import derived
from veneer.training._shared_forward import shared_losses
from veneer.training._subject import Adapted

STEP_OPTIONS = (
    "learning_rate",
    "weight_decay",
    "clip",
    "seed",
    "recipe",
    "loss",
    "total_steps",
    "data",
    "whole",
)


class Seated(Adapted):
    """A member as the loop sees it: what reads the active adapters finds this one alone."""

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


@dataclass
class Member:
    """One adapter of a cohort. error: why it stopped, or None while it trains."""

    name: str
    method: Any
    learning_rate: float
    subject: Seated
    optimizer: Any
    clip: float | None
    loss: Any = None
    total_steps: int | None = None
    steps: int = 0
    error: Exception | None = None
    checked: bool = field(default=False, repr=False)


class Cohort:
    """Adapters that train together. `step` gives each its own batch; `fit` (see there) trains on data to the end."""

    def __init__(self, model: nn.Module, members: Mapping[str, Any], **options: Any) -> None:
        """members: {name: method}, a method being an arm's text ("lora:rank=4+lora_plus"), a Method, a class, or a
        dict {"method": ..., and options of its own}. options: for all members that do not have their own:
        learning_rate (None: from the method's range), weight_decay=0.01, clip=1.0, seed=0, recipe, total_steps,
        whole (modules that are trained whole), data (batches with labels, for methods whose start is made from
        them), loss: (model, batch) -> scalar, from one call of the model; without it the model's own.

        The base's dropout is off while a cohort trains: its masks would depend on who else is in the batch.
        """
        self.model, self.options = model, options
        self.members: dict[str, Member] = {}
        _check(options)
        for name, method in members.items():
            self.add(name, method)
        from veneer import engine

        self._random = engine.random_places(model)
        self.notes = (
            [f"the base's dropout is off in a cohort ({len(self._random)} places)"] if self._random else []
        )

    # -- who is in ---------------------------------------------------------------------------------

    def add(self, name: str, method: Any, **options: Any) -> Member:
        """Let another adapter in, from the next step on. Raises BadOption where the name is taken."""
        from veneer import engine

        if isinstance(method, Mapping):
            given = dict(method)
            method, options = given.pop("method", "lora"), {**given, **options}
        _check(options)
        options = {**self.options, **options}
        if name in self.members or name in engine.adapters(self.model):
            raise BadOption(
                f"a member is already called '{name}'.", next_step="choose another name, or remove it first"
            )
        job = Job(method, {}, options.get("recipe"))
        if not job.is_trained:
            raise BadOption(f"member '{name}': the untrained base has nothing to train.")
        recipe, seed = job.recipe(), options.get("seed", 0)
        if getattr(recipe, "backward", True) is False:
            raise BadOption(
                f"member '{name}': the recipe {job.recipe_text} takes no gradient that a cohort could share.",
                next_step="train it by itself",
            )
        also = {k: options[k] for k in ("total_steps", "data", "whole") if options.get(k)}
        engine.attach(
            self.model, job.method, name=name, activate=False, seed=derived(seed, "attach") % 2**31, **also
        )
        try:
            subject = Seated(self.model, name)
            subject.prepare(options.get("total_steps") or 0)
            rate = job.rate(options.get("learning_rate"), recipe)
            decay = options.get("weight_decay", 0.01)
            optimizer = make_optimizer(subject.groups(rate, decay, recipe), recipe, rate, decay)
        except Exception:
            engine.detach(self.model, name)
            raise
        member = Member(
            name, job.method, rate, subject, optimizer, options.get("clip", 1.0), options.get("loss"),
            options.get("total_steps"),
        )  # fmt: skip
        self.members[name] = member
        return member

    def remove(self, name: str, keep: bool = False) -> None:
        """Let a member leave; its adapter is taken off the model unless keep=True."""
        from veneer import engine

        member = self._member(name)
        del self.members[name]
        if keep:
            engine.require_gradients(self.model, member.name, name in engine.host_of(self.model).active)
        else:
            engine.detach(self.model, name)

    def _member(self, name: str) -> Member:
        if name not in self.members:
            raise UnknownName(
                f"no member of the cohort is called '{name}'.",
                nearest=nearest(name, self.members) or tuple(self.members),
            )
        return self.members[name]

    # -- a step ------------------------------------------------------------------------------------

    def step(self, batches: Mapping[str, Any]) -> dict[str, float]:
        """One update of every member that has a batch: {name: its loss}.

        A batch is what the model's forward takes, with labels; members may bring different numbers of rows and
        tokens, and one without a batch rests. A member that fails (a loss or gradient that is not finite, a label out
        of range, a bad row) stops with its reason in `.members[name].error`, its loss is NaN, and its adapter is what
        it was before the step. Raises that reason only where no member is left.
        """
        from veneer import engine

        going = {n: b for n, b in batches.items() if self._member(n).error is None}
        losses = {n: self._loss(self.members[n], b) for n, b in going.items()}
        was = self.model.training
        self.model.train()
        try:
            with engine.without_dropout(self.model, self._random):
                found = shared_losses(self.model, losses)
                finite = self._finite(found)
                if finite:
                    torch.stack([v.float() for v in finite.values()]).sum().backward()
                    for name in list(finite):
                        self._update(self.members[name])
        finally:
            self.model.train(was)
        stopped = [m.error for n in batches if (m := self.members[n]).error is not None]
        if stopped and len(stopped) == len(batches):
            raise stopped[0]
        return {
            n: math.nan if self.members[n].error is not None else float(finite[n].detach()) for n in batches
        }

    def _loss(self, member: Member, batch: Mapping[str, Any]) -> Any:
        """The member's loss as a function of a model."""
        if member.loss is not None:
            return lambda model: member.loss(model, batch)
        inputs, labels = without_labels(self.model, batch)

        def loss(model: Any) -> Tensor:
            return own_loss(model, model(**inputs), labels)

        kind = tuple(sorted(batch))
        if kind not in self._kinds:
            try:
                check_own_loss(self.model, batch, loss)
                self._kinds.add(kind)
            except (IndexError, RuntimeError, ValueError):
                pass  # a bad batch: the step says whose
        return loss

    @property
    def _kinds(self) -> set[Any]:
        return self.__dict__.setdefault("_checked_kinds", set())

    def _finite(self, found: Mapping[str, Tensor | Exception]) -> dict[str, Tensor]:
        """The losses to go backward from, penalties included; members without one stop."""
        finite = {}
        for name, value in found.items():
            member = self.members[name]
            if isinstance(value, Exception):
                member.error = value
                continue
            penalty = member.subject.penalty()
            value = value if penalty is None else value + penalty
            if not bool(torch.isfinite(value).all()):
                member.error = _not_finite(member, "the loss")
                continue
            finite[name] = value
        return finite

    def _update(self, member: Member) -> None:
        """Clip, step and clear; the member stops where its gradient is not finite."""
        leaves = [p for g in member.optimizer.param_groups for p in g["params"] if p.grad is not None]
        try:
            if not member.checked:
                member.subject.check_gradients()
                member.checked = True
            norm = torch.nn.utils.clip_grad_norm_(leaves, member.clip or math.inf)
            if not math.isfinite(float(norm)):
                member.error = _not_finite(member, "the gradient")
                return
            member.optimizer.step()
            member.steps += 1
            member.subject.between_steps(member.steps, member.total_steps or 0, member.optimizer)
        except Exception as error:
            member.error = error
        finally:
            member.optimizer.zero_grad(set_to_none=True)


def _check(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in STEP_OPTIONS:
            raise UnknownOption(
                f"a cohort has no option {name!r}.", nearest=nearest(name, STEP_OPTIONS),
                next_step='options of a method go into its arm: "lora:rank=16", or LoRA(rank=16)',
            )  # fmt: skip


def _not_finite(member: Member, what: str) -> TrainingFailed:
    return TrainingFailed(
        f"member '{member.name}': {what} is not finite at its step {member.steps}.",
        next_step=f"learning_rate={member.learning_rate / 10:.1g} for this member; then look at its rows",
    )
