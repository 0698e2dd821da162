"""From the splits that a source has to the three that training needs, without a text on two sides."""

from __future__ import annotations

from typing import Any

from veneer.data._measures import text_of
from veneer.data._report import DataReport, Problem
from veneer.data._splits import SPLITS, cut, near, sha1
from veneer.errors import BadData, nearest

Row = dict[str, Any]
Part = list[tuple[int, Row]]


def three_splits(
    parts: dict[str, Part],
    task: str,
    sizes: dict[str, float],
    group: str | None,
    report: DataReport,
    copies: list[Problem],
) -> dict[str, Part]:
    """Train, validation and test, by the source's own splits as far as it has them; fills `copies`."""
    if "" in parts:
        return _cut(parts[""], task, sizes, group, report)
    parts = _without_copies(parts, task, copies)
    if "validation" not in parts:
        report.notes.append("validation rows were cut from the training rows")
        found = _cut(parts["train"], task, {**sizes, "test": 0}, group, report)
        return {**found, "test": parts.get("test", [])}
    if "test" not in parts:
        report.notes.append("test rows are half of the source's validation rows")
        halves = _cut(parts["validation"], task, {"validation": 0, "test": 0.5}, group, report)
        return {"train": parts["train"], "validation": halves["train"], "test": halves["test"]}
    return parts


def _cut(
    part: Part, task: str, sizes: dict[str, float], group: str | None, report: DataReport
) -> dict[str, Part]:
    if group is not None and part and group not in part[0][1]:
        raise BadData(
            f"there is no column {group!r} to group by.",
            nearest=nearest(group, part[0][1]),
            next_step="--groups COLUMN    names a column of the data",
        )
    groups = None if group is None else [row.get(group) for _, row in part]
    texts = [text_of(row, task) for _, row in part]
    where = cut(texts, groups, sizes)
    if "" in where:
        report.notes.append(
            f"{where.count(''):,} rows that copy a test or validation row were left out of training"
        )
    order = sorted(range(len(part)), key=lambda at: sha1(texts[at]))  # so the first rows are a fair sample
    return {split: [part[at] for at in order if where[at] == split] for split in SPLITS}


def _without_copies(parts: dict[str, Part], task: str, problems: list[Problem]) -> dict[str, Part]:
    """Rows of train that stand in validation or test too, and of validation in test, become problems."""
    seen: dict[str, tuple[str, int]] = {}
    kept: dict[str, Part] = {}
    for split in ("test", "validation", "train"):
        if split not in parts:
            continue
        kept[split] = []
        for line, row in parts[split]:
            other, at = seen.setdefault(near(text_of(row, task)), (split, line))
            if other == split:
                kept[split].append((line, row))
            else:
                message = f"nearly the same text as {other} line {at}"
                problems.append(Problem("duplicate between splits", message, line, split, row))
    return kept
