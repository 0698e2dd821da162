"""What is in a data set and what is wrong with it, in a form to print, to store and to raise.

Every problem has a kind, a split and a line number, so that a person can open the file at that place. The
same list feeds the report of `check`, the error of `read`, and the file of rows that were set aside.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.errors import BadData, VeneerError

# What a person can do about each kind of problem, besides setting the rows aside.
REMEDIES = {
    "encoding": "convert the file to UTF-8, for example: iconv -f latin1 -t utf-8 IN > OUT",
    "ragged": "give every line as many fields as the header; fields that hold the delimiter need quotes",
    "quotes": "close the quotes, and double those inside of a quoted field",
    "json": "one JSON object a line",
    "empty text": "fill or delete these rows",
    "missing label": "fill or delete these rows",
    "unknown label": "correct the label, or give all labels with labels=[...]",
    "bad label": "correct the label, or name another task",
    "duplicate between splits": "delete the copies from the training rows",
    "too long": "a larger max_length, or shorter rows",
    "bad chat": "messages with the roles system, user, assistant, in turns",
    "nothing to learn": "every conversation needs an answer of the assistant",
    "bad tags": "as many tags as tokens",
    "bad answer": "an answer that stands in its context, with its place in characters",
    "bad file": "check the path and the file",
}
SHOWN = 5


@dataclass(frozen=True)
class Problem:
    """One row that cannot be used: `line` counts from 1, rows where a source has no lines."""

    kind: str
    message: str
    line: int
    split: str = ""
    row: Any = None


@dataclass
class DataReport:
    """Counts, label balance, lengths and problems of a data set; prints as a table.

    lengths: {split: {"min", "median", "p95", "max"}} in `length_unit`. labels: {label: {split: count}}.
    """

    spec: str
    task: str
    columns: dict[str, Any]
    counts: dict[str, int] = field(default_factory=dict)
    labels: dict[str, dict[str, int]] = field(default_factory=dict)
    lengths: dict[str, dict[str, float]] = field(default_factory=dict)
    length_unit: str = "words"
    problems: list[Problem] = field(default_factory=list)
    set_aside: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; of each kind of problem the count, the first lines and the remedy."""
        return {
            "spec": self.spec, "task": self.task, "columns": self.columns, "ok": self.ok,
            "counts": self.counts, "labels": self.labels, "lengths": self.lengths,
            "length_unit": self.length_unit,
            "problems": [
                {"kind": kind, "count": len(found), "first": [_place(p) for p in found[:SHOWN]],
                 "example": found[0].message, "next": REMEDIES.get(kind, "")}
                for kind, found in grouped(self.problems).items()
            ],
            "set_aside": self.set_aside, "notes": self.notes,
        }  # fmt: skip

    def __str__(self) -> str:
        mapping = ", ".join(f"{role}={column}" for role, column in self.columns.items())
        lines = [f"{self.spec}: task {self.task}, columns {mapping}"]
        for split, count in self.counts.items():
            length = self.lengths.get(split)
            spread = (
                f"   {self.length_unit}: median {length['median']:g}, 95 % below {length['p95']:g}, "
                f"most {length['max']:g}"
                if length
                else ""
            )
            lines.append(f"  {split:<10} {count:>8,} rows{spread}")
        shown = sorted(self.labels.items(), key=lambda item: -sum(item[1].values()))[:20]
        for label, by_split in shown:
            lines.append(f"  label {label:<20} " + "  ".join(f"{s} {n:,}" for s, n in by_split.items()))
        if len(self.labels) > len(shown):
            lines.append(f"  and {len(self.labels) - len(shown)} more labels")
        lines += [f"  note: {note}" for note in self.notes]
        lines += _problem_lines(self.problems) or ["  nothing wrong found"]
        if self.set_aside:
            lines.append(f"  {self.set_aside:,} rows set aside")
        return "\n".join(lines)


def grouped(problems: Iterable[Problem]) -> dict[str, list[Problem]]:
    """{kind: problems}, the most frequent kind first."""
    by_kind: dict[str, list[Problem]] = {}
    for problem in problems:
        by_kind.setdefault(problem.kind, []).append(problem)
    return dict(sorted(by_kind.items(), key=lambda item: -len(item[1])))


def bad_data(spec: str, problems: list[Problem]) -> BadData:
    """The error that lists counts, first line numbers and the next step."""
    kinds = grouped(problems)
    count = len({(p.split, p.line) for p in problems})
    what = [
        f"{spec} has {count:,} row{'s' * (count != 1)} that cannot be trained on:",
        *_problem_lines(problems),
    ]
    steps = list(dict.fromkeys(REMEDIES[kind] for kind in kinds if kind in REMEDIES))[:2]
    return BadData(
        "\n".join(what),
        next_step="; or ".join([*steps, "--skip-bad-rows FILE sets them aside there and goes on"]),
    )


def _problem_lines(problems: list[Problem]) -> list[str]:
    lines = []
    for kind, found in grouped(problems).items():
        places = ", ".join(_place(p) for p in found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
        lines.append(f"  {kind}: {len(found):,} ({places}); first: {found[0].message}")
    return lines


def _place(problem: Problem) -> str:
    return f"{problem.split + ' ' if problem.split else ''}line {problem.line}"


def set_aside(problems: list[Problem], path: str | Path) -> int:
    """Writes the rows of `problems` as JSON lines to `path`, whole or not at all; returns their number."""
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "w", encoding="utf-8") as file:
            for p in problems:
                record = {
                    "split": p.split,
                    "line": p.line,
                    "problem": p.kind,
                    "message": p.message,
                    "row": p.row,
                }
                file.write(json.dumps(record, default=repr) + "\n")
        os.replace(unfinished, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise VeneerError(
            f"the rows set aside cannot be written to {target}: {error.strerror}.",
            next_step="a folder that you may write to",
        ) from error
    return len({(p.split, p.line) for p in problems})


def spread(lengths: list[int]) -> dict[str, float]:
    """Least, median, 95th percentile and greatest of some lengths."""
    ordered = sorted(lengths)
    last = len(ordered) - 1
    return {
        "min": ordered[0], "median": ordered[last // 2],
        "p95": ordered[round(0.95 * last)], "max": ordered[-1],
    }  # fmt: skip


def count_labels(rows_of: dict[str, list[dict]], labels: list[str], key: str) -> dict[str, dict[str, int]]:
    """{label: {split: count}} over rows whose `key` is a label or a list of labels."""
    counts: dict[str, dict[str, int]] = {label: {} for label in labels}
    for split, rows in rows_of.items():
        found: Counter[Any] = Counter()
        for row in rows:
            value = row.get(key)
            found.update(value if isinstance(value, list) else [value])
        for label in labels:
            counts[label][split] = found[label]
    return counts
