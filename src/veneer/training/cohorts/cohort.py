"""`Cohort`: several adapters trained together over one frozen base, one forward and one backward for all.

The base is the cost, adapters are small. Each member has its own method, learning rate, seed, optimizer and clipping;
a step gives each a batch of its own and each its own loss, whose gradients are those of separate training. A member
whose loss is not finite, or whose batch is wrong, stops; the others go on.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import BadOption, UnknownName, UnknownOption, nearest
from veneer.training._job import Job
from veneer.training._optimizer import make_optimizer
from veneer.training._progress import Progress
from veneer.training.cohorts.by_hand import Member
from veneer.training.cohorts.progress import listeners
from veneer.training.cohorts.rounds import CohortResult, Rounds
from veneer.training.cohorts.seated import Seated, seat
from veneer.training.cohorts.shared_forward import shared_losses
from veneer.training.cohorts.train import OPTIONS, wanted_member

OWN = ("loss", "total_steps", "start_data")  # options beside those of `train`


class Cohort:
    """Adapters that train together. `step` gives each its own batch; `fit` trains each on its own data to the end."""

    def __init__(self, model: nn.Module, members: Mapping[str, Any], **options: Any) -> None:
        """members: {name: method}, a method being an arm's text ("lora:rank=4+lora_plus"), a Method, a class, or a
        dict {"method": ..., and options of its own}. options: for all members that do not have their own. They are
        those of `train`; `step` reads learning_rate (None: from the method's range), weight_decay=0.01, clip=1.0,
        seed=0, recipe and whole (modules that are trained whole). Beside them: total_steps; start_data, batches with
        labels for methods whose start is made from them; loss, (model, batch) -> scalar, from one call of the model:
        without it the model's own.

        The base's dropout is off while a cohort trains: its masks would depend on who else is in the batch.
        """
        from veneer import engine

        self.model, self.options = model, options
        self.members: dict[str, Member] = {}
        self._lock = threading.RLock()
        self._rounds: Rounds | None = None
        self._kinds: set[Any] = set()
        _check(options)
        self._random = engine.random_places(model)
        try:
            for name, method in members.items():
                self.add(name, method)
        except Exception:
            for name in list(self.members):
                self.remove(name)
            raise
        self.notes = (
            [f"the base's dropout is off in a cohort ({len(self._random)} places)"] if self._random else []
        )

    # -- who is in ---------------------------------------------------------------------------------

    def add(self, name: str, method: Any, **options: Any) -> Member:
        """Let another adapter in, from the next step on; during `fit` too, from its `on_round` or another thread.

        Raises BadOption where the name is taken.
        """
        from veneer import engine

        if isinstance(method, Mapping):
            given = dict(method)
            method, options = given.pop("method", "lora"), {**given, **options}
        _check(options)
        options = {**self.options, **options, "method": method}
        if name in self.members or name in engine.adapters(self.model):
            raise BadOption(
                f"a member is already called '{name}'.", next_step="choose another name, or remove it first"
            )
        job = Job(method, {}, options.get("recipe"))
        if not job.is_trained:
            raise BadOption(
                f"member '{name}': the untrained base has nothing to train.",
                next_step="leave it out: its score needs no training",
            )
        recipe, seed = job.recipe(), options.get("seed", 0)
        if getattr(recipe, "backward", True) is False:
            raise BadOption(
                f"member '{name}': the recipe {job.recipe_text} takes no gradient that a cohort could share.",
                next_step="train it by itself",
            )
        total, data = options.get("total_steps"), options.get("start_data")
        with self._lock:
            subject = seat(
                self.model,
                name,
                job,
                options.get("whole", ()),
                seed,
                options.get("members"),
                data,
                total_steps=total,
            )
            self.members[name] = self._member_of(name, job, subject, options)
        return self.members[name]

    def _member_of(self, name: str, job: Job, subject: Seated, options: Mapping[str, Any]) -> Member:
        from veneer import engine

        recipe, seed = job.recipe(), options.get("seed", 0)
        try:
            engine.require_gradients(self.model, name)
            subject.prepare(options.get("total_steps") or 0)
            rate = job.rate(options.get("learning_rate"), recipe)
            decay = options.get("weight_decay", 0.01)
            optimizer = make_optimizer(subject.groups(rate, decay, recipe), recipe, rate, decay)
        except Exception:
            engine.detach(self.model, name)
            raise
        return Member(
            name, job, rate, subject, optimizer, seed=seed, clip=options.get("clip", 1.0), loss=options.get("loss"),
            total_steps=options.get("total_steps"), options={k: v for k, v in options.items() if k not in OWN},
        )  # fmt: skip

    def remove(self, name: str, keep: bool = False) -> None:
        """Let a member leave; its adapter is taken off the model unless keep=True."""
        from veneer import engine

        with self._lock:
            member = self._member(name)
            if self._rounds is not None and name in self._rounds.seats:
                self._rounds.leave(name)
            del self.members[name]
            if not keep:
                engine.detach(self.model, name)
                return
            engine.require_gradients(self.model, member.name, name in engine.host_of(self.model).active)

    def _member(self, name: str) -> Member:
        if name not in self.members:
            raise UnknownName(
                f"no member of the cohort is called '{name}'.",
                nearest=nearest(name, self.members) or tuple(self.members),
                next_step="one of these names",
            )
        return self.members[name]

    # -- to the end --------------------------------------------------------------------------------

    def fit(
        self,
        data: Any = None,
        *,
        tokenizer: Any = None,
        device: Any = None,
        output: str | Path | None = None,
        progress: bool | Progress | Callable[[str], Progress] = True,
        on_round: Callable[[Cohort], None] | None = None,
        **options: Any,
    ) -> CohortResult:
        """Train every member on data to its own end: {name: TrainResult} in `.results`, and `.failed`.

        data and options: as for `train`, for members that were not added with their own. output: a folder, in which
        each member has one by its name, as `train` would have written it; the same call goes on after a kill.
        on_round: called with the cohort between rounds (a step of every member that is not done); it may add members
        and remove them. Adapters stay on the model, trained.
        """
        from veneer.bases import Base

        kind = "transformers" if hasattr(self.model, "config") else "function"
        base = Base(self.model, type(self.model).__name__, "", kind, tokenizer=tokenizer, processor=tokenizer)
        for_all = {**self.options, **options} | ({} if data is None else {"data": data})
        for_all = {k: v for k, v in for_all.items() if k not in OWN}
        shared = {k: for_all.get(k) for k in ("mixed_precision", "gradient_checkpointing")}
        with Rounds(
            base, device, mixed_precision=shared["mixed_precision"], listener=listeners(progress),
            gradient_checkpointing=bool(shared["gradient_checkpointing"]),
        ) as rounds:  # fmt: skip
            self._rounds = rounds
            try:
                read: dict[Any, Any] = {}
                self._join(for_all, output, read)
                while self._round():
                    if on_round is not None:
                        on_round(self)
                    self._join(for_all, output, read)
            finally:
                self._rounds = None
                self._settle(rounds.result)
        return rounds.result

    def _round(self) -> bool:
        with self._lock:
            return self._rounds is not None and self._rounds.round()

    def _join(self, for_all: Mapping[str, Any], output: str | Path | None, read: dict[Any, Any]) -> None:
        """Let those in that are not yet: all at the beginning, later those that were added."""
        with self._lock:
            rounds: Any = self._rounds
            for name, member in self.members.items():
                if name in rounds.seats or name in rounds.result.results or name in rounds.result.failed:
                    continue
                own = {**member.options, "learning_rate": member.learning_rate}
                rounds.join(name, wanted_member(name, own, for_all, self.model, output, read))

    def _settle(self, result: CohortResult) -> None:
        """What the members are behind a fit: why they stopped, and optimizers over the leaves of now."""
        for name, member in self.members.items():
            member.error = result.failed.get(name, member.error)
            recipe = member.job.recipe()
            decay = member.options.get("weight_decay", 0.01)
            groups = member.subject.groups(member.learning_rate, decay, None)
            member.optimizer = make_optimizer(groups, recipe, member.learning_rate, decay)

    # -- a step ------------------------------------------------------------------------------------

    def step(self, batches: Mapping[str, Any]) -> dict[str, float]:
        """One update of every member that has a batch: {name: its loss}.

        A batch is what the model's forward takes, with labels; members may bring different numbers of rows and
        tokens, and one without a batch rests. A member that fails (a loss or gradient that is not finite, a label out
        of range, a bad row) stops with its reason in `.members[name].error`, its loss is NaN, and its adapter is what
        it was before the step. Raises that reason only where no member is left.
        """
        from veneer import engine

        going = {n: self._member(n) for n in batches}
        going = {n: m for n, m in going.items() if m.error is None}
        was = self.model.training
        self.model.train()
        finite: dict[str, Tensor] = {}
        try:
            with engine.without_dropout(self.model, self._random), self._lock:
                losses = {n: m.loss_of(self.model, batches[n], self._kinds) for n, m in going.items()}
                found = shared_losses(self.model, losses, {n: m.dropout_seed for n, m in going.items()})
                finite = {n: v for n, m in going.items() if (v := m.checked(found[n])) is not None}
                if finite:
                    torch.stack([v.float() for v in finite.values()]).sum().backward()
                for name in finite:
                    self._update(going[name])
        finally:
            self.model.train(was)
        errors = {n: self.members[n].error for n in batches}
        reasons = [e for e in errors.values() if e is not None]
        if reasons and len(reasons) == len(batches):
            raise reasons[0]
        return {n: math.nan if errors[n] is not None else float(finite[n].detach()) for n in batches}

    def _update(self, member: Member) -> None:
        member.update()


def _check(options: Mapping[str, Any]) -> None:
    known = [*OPTIONS, *OWN]
    for name in options:
        if name not in known:
            raise UnknownOption(
                f"a cohort has no option {name!r}.", nearest=nearest(name, known),
                next_step='options of a method go into its arm: "lora:rank=16", or LoRA(rank=16)',
            )  # fmt: skip
