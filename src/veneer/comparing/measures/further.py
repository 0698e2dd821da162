"""What is asked beyond the test split: groups of its items, other test sets, corrupted copies, off-task sets.

All of it is fixed with the design, before any run: the rows are read and hashed here, every confirmed run is scored
on them as on the test split, and what it scored is sealed with the test predictions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.errors import BadData, BadOption, UnknownName, VeneerError, nearest

ASKED = ("groups", "shifted", "corrupt", "forgetting")
"""The fields of a comparison that ask for more than the test split."""
TRAIN_SAMPLE = "train-sample"
TRAIN_ROWS = 200
MOST_ROWS = 1000  # of another test set
MOST_GROUPS = 30
QUARTERS = 4  # a column of numbers is cut into as many groups

Rows = list[dict[str, Any]]


@dataclass
class Further:
    """rows: {set: rows of the comparison's own task}. off_task: {set: `veneer.data` Splits} that are scored by
    another measure. about: what the design says of each set. groups: {item of the test split: its group}.
    """

    rows: dict[str, Rows] = field(default_factory=dict)
    off_task: dict[str, Any] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    column: str = ""

    def __iter__(self) -> Iterator[str]:
        """The names of all sets, as splits of a confirmed run."""
        return iter([*self.rows, *self.off_task])

    @property
    def count(self) -> int:
        """Rows that every confirmed run reads beside validation and test."""
        off_task = sum(len(splits.train) + len(splits.test) for splits in self.off_task.values())
        return sum(len(rows) for rows in self.rows.values()) + off_task

    def beside(self, data: Any, splits: Sequence[str]) -> Any:
        """The rows of `data` with those of `splits` that are further sets, as `train` takes them."""
        from veneer.training._open import Rows as TrainingRows

        more = {split: self.rows[split] for split in splits if split in self.rows}
        return TrainingRows({**data.parts, **more}, data.task, list(data.labels), data.spec)

    def to_dict(self) -> dict[str, Any]:
        """For the design; empty where nothing is asked for."""
        found: dict[str, Any] = {"sets": self.about} if self.about else {}
        return found | ({"groups": self.column} if self.column else {})


def further_of(data: Any, asked: Mapping[str, Any], most: int = MOST_ROWS, no_model: str = "") -> Further:
    """Read and check all that `asked` names (keys of `ASKED`). data: the comparison's Splits.

    most: rows of another test set. no_model: why the trained models cannot be opened again, if so.
    Errors: UnknownName for a column or corruption, BadData for sets of other labels.
    """
    found = Further()
    if asked.get("groups"):
        found.column = str(asked["groups"])
        found.groups = groups_of(data.test, found.column)
    for spec in _listed(asked.get("shifted")):
        _add_shifted(found, data, spec, most)
    _add_corrupted(found, data, asked.get("corrupt"), most)
    for spec in _listed(asked.get("forgetting")):
        _add_off_task(found, data, spec, no_model)
    return found


def _listed(value: Any) -> list[str]:
    if not value:
        return []
    return [str(value)] if isinstance(value, str | Path) else [str(one) for one in value]


# -- groups ------------------------------------------------------------------------------------------


def groups_of(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, str]:
    """{item: group} by the values of a column; a column of many numbers is cut at its quartiles."""
    names = sorted({name for row in rows for name in row})
    if column not in names:
        raise UnknownName(
            f"the test rows have no column '{column}' to make groups of.", nearest=nearest(column, names) or names,
            next_step="--groups COLUMN, a column of the data",
        )  # fmt: skip
    values = [row.get(column) for row in rows]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(values) and len(set(numbers)) > 10:
        return {str(place): name for place, name in enumerate(_quarters(numbers))}
    texts = [_group_name(value) for value in values]
    if len(set(texts)) > MOST_GROUPS:
        raise BadOption(
            f"the column '{column}' has {len(set(texts))} different values in {len(texts)} test rows: expected at "
            f"most {MOST_GROUPS} groups.",
            next_step="--groups with a column of few values, or of numbers",
        )
    return {str(place): name for place, name in enumerate(texts)}


def _group_name(value: Any) -> str:
    if value is None or value != value or value == "":
        return "(none)"
    return "|".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _quarters(numbers: Sequence[float]) -> list[str]:
    import numpy as np

    values = np.array(numbers, dtype=np.float64)
    edges = np.unique(np.quantile(values, np.arange(1, QUARTERS) / QUARTERS, method="lower"))
    place = np.digitize(values, edges, right=True)
    spans = {p: (values[place == p].min(), values[place == p].max()) for p in set(place.tolist())}
    names = {p: f"{low:g} to {high:g}" for p, (low, high) in spans.items()}
    return [names[p] for p in place.tolist()]


# -- other test sets ---------------------------------------------------------------------------------


def _add_shifted(found: Further, data: Any, spec: str, most: int) -> None:
    from veneer.data import domains_of

    for one in domains_of(spec):
        if one == data.spec:
            continue  # the domain that was trained on is the test split itself
        rows = read_alike(one, data)
        kept = _not_trained_on(rows, data)
        if len(kept) < 2:
            raise BadData(
                f"the shifted set '{one}' has {len(rows)} rows, of which {len(rows) - len(kept)} stand in the data of "
                "the comparison, too: expected at least 2 of its own.",
                next_step="--shifted with data from another source",
            )
        name = _free(found.about, f"shifted-{_short(one)}")
        found.rows[name] = kept[:most]
        found.about[name] = {
            "kind": "shifted", "name": _short(one), "from": one, "rows": len(found.rows[name]),
            "copies_left_out": len(rows) - len(kept), "sha256": _digest(found.rows[name]),
        }  # fmt: skip


def read_alike(spec: str, data: Any) -> Rows:
    """All rows of `spec`, read for the task and the labels of `data`; its test split where it has one."""
    from veneer.data import read

    alike: dict[str, Any] = {"task": data.task, "labels": data.labels or None}
    tries: list[dict[str, Any]] = [{"columns": data.columns}, {}]
    problem: VeneerError | None = None
    for further in tries if not spec.startswith("builtin:") else [{"columns": data.columns}]:
        for split in ({"split": "test"}, {}):
            try:
                splits = read(spec, **alike, **further, **split)
            except VeneerError as error:
                problem = error
                continue
            parts = splits.parts
            return [row for name in ("test", "validation", "train") for row in parts[name]]
    assert problem is not None
    raise problem


def _not_trained_on(rows: Rows, data: Any) -> Rows:
    from veneer.data._measures import text_of
    from veneer.data._splits import near

    seen = {near(text_of(row, data.task)) for part in data.parts.values() for row in part}
    return [row for row in rows if near(text_of(row, data.task)) not in seen]


def _add_corrupted(found: Further, data: Any, wanted: Any, most: int) -> None:
    if not wanted:
        return
    from veneer.data import corrupt_row, parse_corruptions
    from veneer.tasks._media import picture

    for kind, severity in parse_corruptions(wanted, data.task):
        name = f"corrupted-{kind}-{severity}"
        found.rows[name] = [
            corrupt_row(row, data.task, kind, severity, opened=picture) for row in data.test[:most]
        ]
        found.about[name] = {
            "kind": "corrupted", "name": kind, "severity": severity, "rows": len(found.rows[name]),
            "sha256": _digest(found.rows[name]),
        }  # fmt: skip


def _add_off_task(found: Further, data: Any, spec: str, no_model: str) -> None:
    from veneer.comparing.measures.forgetting import WHY_NOT, measure_for, read_off_task

    measure = measure_for(data.task)
    name = _free(found.about, f"forgetting-{_short(spec)}")
    found.about[name] = {"kind": "forgetting", "name": _short(spec), "from": spec, "measure": measure}
    why_not = WHY_NOT.format(task=data.task) if measure is None else no_model
    if measure is None or why_not:
        found.about[name]["not_applicable"] = why_not
        return
    splits = found.off_task[name] = read_off_task(spec, measure)
    found.about[name] |= {"rows": len(splits.test), "sha256": _digest(splits.parts)}


def _short(spec: str) -> str:
    """A readable part of a file name: the set's name, or the file's."""
    import re

    plain = spec.removeprefix("builtin:")
    stem = Path(plain).stem if "/" in plain or "." in plain else plain
    return re.sub(r"[^\w]+", "-", stem).strip("-")[:40] or "set"


def _free(taken: Mapping[str, Any], name: str) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free


def _digest(rows: Any) -> str:
    """SHA-256 of rows, of what is no text or number by all of its bytes."""

    def plain(value: Any) -> str:
        # The text of an array leaves most of it out.
        data = value if isinstance(value, bytes) else getattr(value, "tobytes", repr(value).encode)()
        return hashlib.sha256(data).hexdigest()

    text = json.dumps(rows, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def train_sample(data: Any) -> Rows:
    """Training rows, evenly spread, to see how much better an arm is where it learned; as many as validation has."""
    count = min(TRAIN_ROWS, len(data.validation), len(data.train))
    return data.train[:: max(1, len(data.train) // count)][:count] if count else []
