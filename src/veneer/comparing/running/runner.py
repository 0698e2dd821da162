"""The trainer that `compare` uses when it is given none: `veneer.training` on data that `veneer.data` reads.

Thin on purpose. What it adds is the untrained base (which for labels is the best constant guess), and the
sizes and epochs that a budget means.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from veneer.comparing.measures.further import ASKED, MOST_ROWS, TRAIN_SAMPLE, further_of, train_sample
from veneer.comparing.planning.arms import OPTIONAL_CONTROLS, Arm
from veneer.comparing.planning.budget import Budget
from veneer.comparing.planning.control_hooks import Norms, changes, fixed_numbers, keep_norms, kept_norms
from veneer.comparing.planning.design import canonical_json
from veneer.comparing.running.guess import GUESSED, constant_guess
from veneer.errors import Unsupported

DEMO_SIZES = {"train": 190, "validation": 200, "test": 300}
DEMO_EPOCHS = 2
READING = ("columns", "sizes", "group", "split")
"""Options of reading the data, not of training."""
THRESHOLD = 0.8
"""Overlap of shingles from which on a training row is a near-duplicate of a held-out one."""
IN_MEMORY = "the base is in memory, and cannot be opened again from a name"
COST_ROWS = 512  # training rows, evenly spread, that costs are measured on


class TrainingRunner:
    """`run_arm` over `veneer.training.train`. The data are read once, here."""

    def __init__(
        self, model: Any, data: Any, task: str | None, budget: Budget, options: Mapping[str, Any]
    ) -> None:
        from veneer.data import Splits, read, without_near_copies
        from veneer.tasks import find_task

        self.model, self.budget, self.options = model, budget, dict(options)
        self._base: Any = None  # open while arms are counted
        self.anchors: frozenset[str] = frozenset()  # arms whose norms a control will need
        self.reading = {key: self.options.pop(key) for key in READING if key in self.options}
        asked = {key: self.options.pop(key) for key in ASKED if key in self.options}
        overlap = float(self.options.pop("near_duplicates", THRESHOLD))
        self.data = data if isinstance(data, Splits) else read(data, task=task, **self.reading)
        self.data, self.near = without_near_copies(self.data, overlap)
        if budget.kind == "demo":
            for split, size in DEMO_SIZES.items():
                setattr(self.data, split, getattr(self.data, split)[:size])
        most = DEMO_SIZES["test"] if budget.kind == "demo" else MOST_ROWS
        self.beyond = further_of(self.data, asked, most, "" if isinstance(model, str | Path) else IN_MEMORY)
        if budget.kind != "demo":
            self.beyond.rows[TRAIN_SAMPLE] = train_sample(self.data)
        self.task = find_task(self.data.task).from_rows(self.data.train, self.data.labels or None)
        self.options = self.amount() | self.options

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(rows) for name, rows in self.data.parts.items()}

    @property
    def data_sha256(self) -> str:
        return hashlib.sha256(canonical_json(self.data.parts, default=_content).encode()).hexdigest()

    @property
    def families(self) -> dict[str, str]:
        """{method: family} of all methods there are."""
        return {key: cls.facts.family for key, cls in _methods().items()}

    @property
    def recipes(self) -> list[str]:
        from veneer.recipes import registry

        return list(registry())

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """The learning rates that methods and, as "+name", recipes declare."""
        from veneer.recipes import registry

        found = {key: cls.facts.rates for key, cls in _methods().items()}
        return found | {f"+{key}": cls.rates for key, cls in registry().items() if cls.rates is not None}

    def open_base(self) -> Any:
        """The base with its model, for plans; a model that was given in memory is itself."""
        from veneer.bases import open_base

        if not isinstance(self.model, str | Path):
            model = self.model[0] if isinstance(self.model, tuple) else self.model
            return model if hasattr(model, "model") else SimpleNamespace(model=model)
        opens = {key: self.options[key] for key in ("dtype", "quantise", "matmul") if key in self.options}
        return open_base(str(self.model), task=self.task.name, num_labels=self.task.num_labels, **opens)

    def method_of(self, arm: Arm) -> Any:
        """The method that an arm trains, or None where it trains none."""
        from veneer.edits import build

        return build(arm.anchor.method, **dict(arm.options)) if arm.is_trained else None

    def count(self, arm: Arm) -> int:
        """Trained parameters of an arm on this base, the head apart; raises where the arm cannot be."""
        from veneer import engine
        from veneer.comparing.planning.measure import trained_beside_head

        if self._base is None:
            self._base = self.open_base()
        plan = engine.plan(self._base.model, self.method_of(arm))
        return trained_beside_head(plan, getattr(self._base, "fresh", ()))

    def close_base(self) -> None:
        self._base = None

    def check(self, arm: Arm) -> None:
        """Raise for an option that the method or recipe does not have, before anything runs."""
        from veneer.recipes import parse

        self.method_of(arm)
        for recipe in arm.recipes:
            parse(recipe.name, **dict(recipe.options))

    def __call__(
        self,
        *,
        arm: Arm,
        seed: int,
        learning_rate: float | None,
        splits: tuple[str, ...],
        output: Path,
        share: float = 1.0,
    ) -> Any:
        """One run. share: of the budget."""
        if arm.method == "untrained" and self.task.name in GUESSED:
            return self.with_off_task(constant_guess(self, splits, output), splits, output)
        if arm.method in OPTIONAL_CONTROLS:
            found = self.control(arm, splits, seed=seed, learning_rate=learning_rate, output=output)
            return self.with_off_task(found, splits, output)
        given = {"seed": seed, "learning_rate": learning_rate, "output": output, **self.shared(share)}
        norms = self.norms_to_keep(arm, splits)
        found = self.train(arm, splits, **given, **({} if norms is None else {"hooks": [norms]}))
        if norms is not None:
            keep_norms(norms, output, seed, learning_rate)
        return self.with_off_task(found, splits, output)

    def shared(self, share: float) -> dict[str, Any]:
        """What the options of training say of its length, for a share of the budget; its schedule is as long."""
        if share == 1:
            return {}
        from veneer.training import Settings

        ends = {
            name: self.options[name]
            for name in ("max_steps", "max_tokens", "max_seconds")
            if self.options.get(name)
        }
        if not ends:
            return {"epochs": share * self.options.get("epochs", Settings.epochs)}
        whole = {"max_steps", "max_tokens"}
        return {k: max(1, round(share * v)) if k in whole else share * v for k, v in ends.items()}

    def norms_to_keep(self, arm: Arm, splits: tuple[str, ...]) -> Norms | None:
        """A hook for a run that a random direction will be measured by: one that is confirmed, of its anchor."""
        return Norms() if str(arm) in self.anchors and "test" in splits else None

    def train(self, arm: Arm, splits: tuple[str, ...], **given: Any) -> Any:
        """One training of an arm, with the options of all, evaluated on those of `splits` that are of this task."""
        import gc

        from veneer.training import train

        gc.collect()  # models hold cycles: the last one is still there
        inside = tuple(split for split in splits if split not in self.beyond.off_task)
        return train(
            model=self.model,
            data=self.beyond.beside(self.data, inside),
            method=str(arm),
            task=self.data.task,
            evaluate_on=inside,
            progress=False,
            **self.options | given,
        )

    def with_off_task(self, result: Any, splits: tuple[str, ...], output: Path) -> Any:
        """The result with what the trained model still knows of other tasks."""
        from veneer.comparing.measures.forgetting import knows

        wanted = [split for split in splits if split in self.beyond.off_task]
        if wanted:
            of = {split: self.beyond.off_task[split] for split in wanted}
            with contextlib.suppress(Unsupported):  # a base that no probe can read: the summary names the arm
                result.predictions |= knows(self.model, self.task, output, of, self.options)
        return result

    def control(self, arm: Arm, splits: tuple[str, ...], **given: Any) -> Any:
        """A run of a control: see `veneer.comparing.planning.controls`."""
        norms = None
        if arm.method == "random_direction":
            self.check_norms(arm)
            norms = kept_norms(arm, given["output"], given["seed"], given["learning_rate"])
            if norms is None:
                norms = Norms()
                self.train(arm.anchor, (), **given | {"output": None}, hooks=[norms])
        changed = changes(arm, given["seed"], norms)
        found = self.train(arm.anchor, splits, **given | changed)
        found.trainable_parameters -= fixed_numbers(changed)
        return found

    def check_norms(self, arm: Arm) -> None:
        """Raise Unsupported where the update of the arm's anchor is not B A."""
        if self.method_of(arm).start_reads_weight:
            raise Unsupported(
                f"{arm.anchor} starts from the weights, so that its update is not B A and has no norm to match.",
                next_step="an anchor with init='default'",
            )

    def alone(self, arm: Arm, learning_rate: float | None) -> dict[str, Any] | None:
        """What another process needs to run this arm by itself; None where it could not open the base."""
        from dataclasses import replace

        if not isinstance(self.model, str | Path):
            return None
        every = max(1, len(self.data.train) // COST_ROWS)
        return {
            "model": str(self.model),
            "data": replace(self.data, train=self.data.train[::every], validation=[], test=[]),
            "method": str(arm.anchor),
            "is_trained": arm.is_trained,
            "learning_rate": learning_rate,
            "options": self.options,
        }

    def show(self, items: Sequence[str]) -> dict[str, dict[str, Any]]:
        """{item: its text or picture} for test items, whose ids are places in the split."""
        from veneer.comparing.reporting.items import described

        rows = self.data.test
        known = [item for item in items if item.isdecimal() and int(item) < len(rows)]
        return {item: described(rows[int(item)]) for item in known}

    def amount(self) -> dict[str, Any]:
        """The budget as options of training. The order of the data is the same for all arms, so that equal
        passes are equal tokens. Tokens are real ones: neither padding nor what a method adds counts."""
        kind, amount = self.budget.kind, self.budget.amount
        if kind == "demo":
            return {"epochs": DEMO_EPOCHS}
        if kind == "examples" and amount is not None:
            return {"epochs": amount / max(1, len(self.data.train))}
        if kind == "tokens" and amount is not None:
            return {"max_tokens": round(amount)}
        if kind == "minutes" and amount is not None:
            return {"max_seconds": 60 * amount}
        return {}


def _content(value: Any) -> str:
    """What stands for a picture or a sound: its bytes' digest, since its text may hold an address in memory."""
    data = value if isinstance(value, bytes) else getattr(value, "tobytes", str(value).encode)()
    return hashlib.sha256(data).hexdigest()


def _methods() -> dict[str, Any]:
    import veneer.methods  # noqa: F401  registers them
    from veneer.edits import registry

    return registry()


def default_runner(
    model: Any, data: Any, *, task: str | None, budget: Budget, options: Mapping[str, Any]
) -> TrainingRunner:
    """The trainer for `model` on `data`; reads the data, opens the base later."""
    return TrainingRunner(model, data, task, budget, options)
