"""Several tasks and bases: every one is shown, and what they say together.

Scores of different tasks do not add, so that a difference is divided by how much single scores of that task
spread (Cohen's d) before it is averaged. Tasks are the sample: bases on the same data are averaged first, and the
interval is over tasks, by a studentised bootstrap, or by t where they are too few to resample. The interval says
what a further task of this kind would show, and tasks that people choose are never drawn at random.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from veneer.comparing.inference.cells import Cell, read_cell
from veneer.comparing.inference.scores import RunScores
from veneer.comparing.inference.statistics import Array, spread_of_runs
from veneer.comparing.running.ledger import write_atomic
from veneer.errors import BadData, UnknownName, nearest

FEW = 6
"""Below so many tasks nothing is resampled: the bootstrap of four numbers knows only those four."""


@dataclass(frozen=True)
class InCell:
    """One arm against the anchor in one comparison; `standardised` is None where items are not known."""

    cell: str
    data: str
    model: str
    metric: str
    mean: float
    anchor_mean: float
    difference: float
    low: float
    high: float
    standardised: float | None
    smallest_effect: float

    @property
    def verdict(self) -> str:
        """By the estimate: "win", "loss", or "tie" within the smallest effect of interest."""
        if abs(self.difference) < self.smallest_effect:
            return "tie"
        return "win" if self.difference > 0 else "loss"

    @property
    def sure(self) -> bool:
        """Whether the 95 % interval says the same as the verdict."""
        if self.verdict == "tie":
            return -self.smallest_effect < self.low and self.high < self.smallest_effect
        return self.low > 0 if self.verdict == "win" else self.high < 0


@dataclass(frozen=True)
class OverTasks:
    """One arm against the anchor over all tasks. low and high are None with a single task."""

    arm: str
    cells: tuple[InCell, ...]
    tasks: int
    mean: float | None
    low: float | None
    high: float | None
    how: str
    task_means: dict[str, float]

    def count(self, verdict: str, sure: bool = False) -> int:
        return sum(one.verdict == verdict and (one.sure or not sure) for one in self.cells)

    def to_dict(self) -> dict[str, Any]:
        cells = [{**asdict(one), "verdict": one.verdict, "sure": one.sure} for one in self.cells]
        counts = {
            f"{prefix}{plural}": self.count(verdict, bool(prefix))
            for prefix in ("", "sure_")
            for verdict, plural in (("win", "wins"), ("tie", "ties"), ("loss", "losses"))
        }
        return {**asdict(self), "cells": cells, **counts}


@dataclass(frozen=True)
class Across:
    """Every arm that is in all comparisons, against the anchor."""

    anchor: str
    arms: tuple[OverTasks, ...]
    cells: tuple[str, ...]
    tasks: int
    left_out: dict[str, list[str]]

    @property
    def is_few(self) -> bool:
        return self.tasks < FEW

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to across.json."""
        return {
            "anchor": self.anchor,
            "cells": list(self.cells),
            "tasks": self.tasks,
            "few_tasks": self.is_few,
            "arms": [arm.to_dict() for arm in self.arms],
            "left_out": self.left_out,
            "notes": self.notes,
        }

    @property
    def notes(self) -> list[str]:
        number = "one task" if self.tasks == 1 else f"{self.tasks} tasks"
        found = [
            f"Differences are from {self.anchor}, each divided by the standard deviation of single scores of its task."
        ]
        if self.tasks == 1:
            found.append(f"There is {number}: nothing is known of others.")
        elif self.is_few:
            found.append(
                f"There are {number}: few, so that the interval is wide and rests on the normal form."
            )
        for arm, missing in self.left_out.items():
            found.append(f"{arm} is left out: it was not measured in {', '.join(missing)}.")
        return found

    def __str__(self) -> str:
        lines = []
        for arm in self.arms:
            lines.append(f"{arm.arm} - {self.anchor}: {_interval(arm.mean, arm.low, arm.high)} deviations over "
                         f"{arm.tasks} task{'s' if arm.tasks != 1 else ''} ({arm.how})")  # fmt: skip
            sure = f"of which sure: {arm.count('win', True)}, {arm.count('tie', True)}, {arm.count('loss', True)}"
            lines.append(
                f"  {arm.count('win')} wins, {arm.count('tie')} ties, {arm.count('loss')} losses ({sure})"
            )
            for one in arm.cells:
                place = f"{one.data} | {one.model}" if one.model else one.data or one.cell
                lines.append(
                    f"    {place}: {one.metric} {_interval(one.difference, one.low, one.high)}, {one.verdict}"
                )
        return "\n".join([*lines, *self.notes])

    def write(self, folder: str | Path) -> Path:
        """across.json in `folder`."""
        path = Path(folder) / "across.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")
        return path


def across(folders: Sequence[str | Path | Cell], anchor: str | None = None) -> Across:
    """What several comparisons say together. anchor: the arm that all are compared with; default `lora`.

    An arm that is missing in any of them is left out and named: a mean over other tasks is another mean.
    Errors: BadData where no two arms are in all; UnknownName for an anchor that is not.
    """
    cells = [one if isinstance(one, Cell) else read_cell(one) for one in folders]
    everywhere = [arm for arm in cells[0].scores.of if all(arm in cell.scores.of for cell in cells)]
    if len(everywhere) < 2:
        raise BadData(
            f"{len(cells)} comparisons have {len(everywhere)} arms in common: expected at least 2.",
            next_step="compare the same arms on every task",
        )
    if anchor is None:
        anchor = "lora" if "lora" in everywhere else _first_lora(everywhere)
    if anchor not in everywhere:
        raise UnknownName(
            f"the anchor '{anchor}' is not in all comparisons.",
            nearest=nearest(anchor, everywhere) or everywhere[:5],
            next_step="choose an arm that all have",
        )
    every = {arm for cell in cells for arm in cell.scores.of}
    left_out = {
        arm: [cell.name for cell in cells if arm not in cell.scores.of]
        for arm in sorted(every - set(everywhere))
    }
    found = [_over_tasks(arm, anchor, cells) for arm in everywhere if arm != anchor]
    found.sort(key=lambda one: -(one.mean if one.mean is not None else -np.inf))
    names = tuple(cell.name for cell in cells)
    return Across(anchor, tuple(found), names, len({cell.data for cell in cells}), left_out)


def _first_lora(arms: Sequence[str]) -> str:
    return next((arm for arm in arms if arm.split(":")[0] == "lora"), arms[0])


def _over_tasks(arm: str, anchor: str, cells: Sequence[Cell]) -> OverTasks:
    inside = tuple(_in_cell(arm, anchor, cell) for cell in cells)
    by_task: dict[str, list[float]] = {}
    for one in inside:
        if one.standardised is not None:
            by_task.setdefault(one.data, []).append(one.standardised)
    means = {task: float(np.mean(values)) for task, values in by_task.items()}
    if len(means) < len({one.data for one in inside}):
        return OverTasks(
            arm, inside, len(means), None, None, None, "a task has no scores of items to divide by", means
        )
    mean, low, high, how = over_tasks(np.array(list(means.values())))
    return OverTasks(arm, inside, len(means), mean, low, high, how, means)


def _in_cell(arm: str, anchor: str, cell: Cell) -> InCell:
    scores = cell.scores
    gap = scores.difference(arm, anchor, flips=False)
    deviation = _deviation(scores, (arm, anchor))
    return InCell(
        cell.name,
        cell.data,
        cell.model,
        str(cell.summary["analysed"]),
        float(scores.of[arm].mean()),
        float(scores.of[anchor].mean()),
        gap.estimate,
        gap.low,
        gap.high,
        gap.estimate / deviation if deviation else None,
        cell.smallest_effect,
    )


def _deviation(scores: Any, arms: Sequence[str]) -> float | None:
    """Pooled standard deviation of single scores of both arms."""
    if isinstance(scores, RunScores):
        if scores.right_or_wrong is None:
            return None
        variances = [
            spread_of_runs(scores.of[arm][:, 0], 1).from_items for arm in arms
        ]  # of one item: p (1 - p)
    else:
        variances = [scores.of[arm].var(axis=1, ddof=1).mean() for arm in arms]
    return float(np.sqrt(np.mean(variances))) or None


def over_tasks(
    values: Array, confidence: float = 0.95, resamples: int = 10_000
) -> tuple[float, float | None, float | None, str]:
    """(mean, low, high, how) of one number a task.

    From FEW tasks on a studentised bootstrap (Efron and Tibshirani, 1993, chapter 12): a percentile bootstrap of
    so small samples is too narrow. Below, the t interval.
    """
    from scipy import stats

    tasks, mean = len(values), float(values.mean())
    if tasks == 1:
        return mean, None, None, "a single task has no interval"
    error = float(values.std(ddof=1)) / tasks**0.5
    if tasks < FEW or error == 0.0:
        half = float(stats.t.ppf((1 + confidence) / 2, tasks - 1)) * error
        return mean, mean - half, mean + half, f"t over {tasks} tasks, too few to resample"
    drawn = values[np.random.default_rng(0).integers(tasks, size=(resamples, tasks))]
    errors = drawn.std(1, ddof=1) / tasks**0.5
    kept = errors > 1e-3 * error  # a draw of one task alone has no deviation
    studentised = (drawn.mean(1)[kept] - mean) / errors[kept]
    low, high = np.quantile(studentised, ((1 - confidence) / 2, (1 + confidence) / 2))
    return mean, mean - float(high) * error, mean - float(low) * error, f"bootstrap-t over {tasks} tasks"


def _interval(mean: float | None, low: float | None, high: float | None) -> str:
    if mean is None:
        return "not known"
    return f"{mean:+.3f}" if low is None or high is None else f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
