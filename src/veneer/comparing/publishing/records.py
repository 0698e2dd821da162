"""Records: all that is known of each arm when its runs are done, and the item scores of all of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from veneer.comparing.inference.analysis import Scores
from veneer.comparing.planning.arms import Arm
from veneer.comparing.running.runs import COSTS
from veneer.errors import BadData


@dataclass
class Record:
    """All that is known of one arm: its trials, a line and an opened test result a seed, and its best run."""

    arm: Arm
    status: str = "ok"
    reason: str = ""
    learning_rate: float | None = None
    trials: list[dict[str, Any]] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    opened: list[dict[str, Any] | None] = field(default_factory=list)
    best: dict[str, Any] | None = None
    measured: dict[str, Any] = field(default_factory=dict)  # its costs, alone in a process (costs.py)

    @property
    def costs(self) -> dict[str, float | None]:
        """The median over seeds of each cost that was measured."""
        return {key: _median([line.get(key) for line in self.lines]) for key in COSTS}

    @property
    def tuning_seconds(self) -> float:
        return sum(line.get("seconds") or 0.0 for line in self.trials)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    middle = statistics.median(known)
    return int(middle) if all(isinstance(value, int) for value in known) and middle == int(middle) else middle


def scores_of(records: Sequence[Record]) -> Scores:
    """Item scores of all arms over the same items. A run that diverged scores as the untrained base does."""
    measured = [record for record in records if record.status == "ok" and record.lines]
    first = next((opened for record in measured for opened in record.opened if opened), None)
    if first is None:
        raise BadData("no run has scores on the test split.", next_step="see 'reason' in ledger.jsonl")
    items = tuple(sorted(item["item"] for item in first["items"]))  # in an order that no file decides
    if len(items) < 2 or len(set(items)) != len(items):
        raise BadData(
            f"the test split has {len(items)} items with {len(set(items))} different ids: "
            "expected at least 2, each id once.",
            next_step="give every item an id of its own",
        )
    chance = _chance(measured, items)
    of, seeds = {}, {}
    for record in measured:
        rows = [
            chance if opened is None else _in_order(opened, items, record.arm) for opened in record.opened
        ]
        if any(row is None for row in rows):
            record.status = "failed"
            record.reason = "it diverged, and the untrained base, whose score it would get, was not measured"
            continue
        of[str(record.arm)] = np.array(rows, dtype=np.float64)
        seeds[str(record.arm)] = tuple(line["seed"] for line in record.lines)
    return Scores(of, seeds, items)


def _chance(measured: Sequence[Record], items: tuple[str, ...]) -> list[float] | None:
    for record in measured:
        if not record.arm.is_trained and record.opened and record.opened[0]:
            return _in_order(record.opened[0], items, record.arm)
    return None


def _in_order(opened: Mapping[str, Any], items: tuple[str, ...], arm: Arm) -> list[float]:
    found = {item["item"]: item["score"] for item in opened["items"]}
    missing, further = [i for i in items if i not in found], set(found) - set(items)
    if missing or further or len(found) != len(opened["items"]):
        raise BadData(
            f"'{arm}' was scored on other test items than the first arm: {len(missing)} missing "
            f"({', '.join(missing[:3])}), {len(further)} more ({', '.join(sorted(further)[:3])}), "
            f"{len(opened['items']) - len(found)} twice.",
            next_step="score every arm and seed on the same items: the comparison is paired",
        )
    return [found[item] for item in items]
