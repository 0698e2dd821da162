"""`read` and `check`: from what a person types to splits that can be trained on, or to what is wrong with it.

The way of a row: the reader's (line, row); columns and task, seen over all rows; each row cleaned under the
names of roles; labels that are known; copies between splits; the cut. `read` stops at the first doubt unless
the bad rows may be set aside; `check` gives the whole list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from veneer.data._builtin import builtin
from veneer.data._chat import BadRow
from veneer.data._columns import choose, number, parse_columns
from veneer.data._cutting import three_splits
from veneer.data._formats import Raw
from veneer.data._measures import length_of, text_of, tokens_of
from veneer.data._places import read_raw, split_name
from veneer.data._report import DataReport, Problem, bad_data, count_labels, set_aside, spread
from veneer.data._rows import cleaned
from veneer.data._splits import SPLITS, Splits, near, parse_sizes
from veneer.errors import BadData, UnknownName, UnknownOption, nearest

Row = dict[str, Any]
Part = list[tuple[int, Row]]
LABEL_ROLES = {
    "classify": "label",
    "multilabel": "label",
    "tag": "tags",
    "image-classify": "label",
    "vqa": "label",
}


@dataclass(frozen=True)
class Reading:
    """How to read: the options of `read`, each explained there."""

    columns: str | Mapping[str, Any] | None = None
    task: str | None = None
    split: str | None = None
    sizes: Any = None
    group: str | None = None
    labels: Sequence[str] | None = None
    labelled: bool = True
    tokenizer: Any = None
    max_length: int | None = None


def read(spec: Any, *, skip_bad_rows: str | Path | None = None, **options: Any) -> Splits:
    """The splits of `spec`, checked; a row that cannot be trained on is an error with its line number.

    spec: CSV, TSV, JSONL, JSON, Parquet, a folder (of `datasets`, of train/validation/test files, of images
    in class folders), a hub id, "builtin:NAME", or rows in memory.
    skip_bad_rows: a file that takes the bad rows; reading goes on.
    Options: columns ({role: column} or "text=a,label=b"); task (None finds it from columns and values);
    split (this split of the source alone, cut anew); sizes of validation and test, counts or shares
    ("validation=500,test=0.1"); group (a column whose rows stay on one side); labels (the known names, in
    order; others are errors); labelled (False: rows to predict, all in `test`); tokenizer, max_length
    (longer rows are bad).
    Raises BadData, UnknownName, UnknownOption, MissingPackage.
    """
    splits = _prepared(spec, _reading(options))
    report = splits.report
    assert report is not None
    problems = report.problems
    if problems and skip_bad_rows is None:
        raise bad_data(splits.spec, problems)
    if skip_bad_rows is not None:
        report.set_aside, report.problems = set_aside(problems, skip_bad_rows), []
    _hold_usable(splits, options.get("labelled", True), bool(problems))
    return splits


def check(spec: Any, task: str | None = None, **options: Any) -> DataReport:
    """What is in the data and what is wrong with it; the options are those of `read`.

    Rows that cannot be used are in `.problems`; only data that cannot be read at all raises. Splits are
    checked again where options are given, else their own report is returned.
    """
    if isinstance(spec, Splits):
        if spec.report is not None and not options:
            return spec.report
        named = {role: role for role in spec.columns}
        options = {"labels": spec.labels or None, "columns": named, **options}
        spec, task = {s: rows for s, rows in spec.parts.items() if rows}, spec.task
    report = _prepared(spec, _reading({"task": task, **options})).report
    assert report is not None
    return report


def _reading(options: dict[str, Any]) -> Reading:
    known = [field.name for field in fields(Reading)]
    for name in options:
        if name not in known:
            raise UnknownOption(
                f"reading data has no option {name!r}.",
                nearest=nearest(name, known),
                next_step=", ".join(known),
            )
    return Reading(**options)


def _prepared(spec: Any, how: Reading) -> Splits:
    """Splits of the good rows, and in their report the problems of the others."""
    name = str(spec) if isinstance(spec, (str, Path)) else f"the given {type(spec).__name__}"
    raw = builtin(name.removeprefix("builtin:")) if name.startswith("builtin:") else read_raw(spec)
    raw = _unfolded(_picked(raw, how.split, name))
    rows = [row for part in raw.parts.values() for _, row in part]
    if not rows and raw.problems:
        raise bad_data(name, raw.problems)
    if not rows:
        raise BadData(f"{name} has no rows.", next_step="a header line and at least three rows")
    task, columns = _roles(raw, rows, how)
    report = DataReport(name, task, columns, problems=raw.problems, notes=raw.notes)
    parts = {split: _cleaned(part, split, how, report) for split, part in raw.parts.items()}
    parts = {split: part for split, part in parts.items() if part or split == ""}
    labels = list(how.labels or [])
    if how.labelled and task in LABEL_ROLES:
        column = columns[LABEL_ROLES[task]]
        known = how.labels or (column if isinstance(column, list) else raw.labels.get(column))
        labels = _known_only(parts, LABEL_ROLES[task], known, report.problems)
    lengths = _measured(parts, how, report)
    if how.labelled:
        sizes = {**(raw.sizes or {}), **parse_sizes(how.sizes)}
        copies: list[Problem] = []
        parts = three_splits(parts, task, sizes, how.group or raw.group, report, copies)
        if raw.drop_copies and copies:
            report.notes.append(f"{len(copies):,} rows that copy a row of another split were left out")
        else:
            report.problems.extend(copies)
    else:
        parts = {"test": [pair for part in parts.values() for pair in part]}
    train, validation, test = ([row for _, row in parts.get(s, [])] for s in SPLITS)
    splits = Splits(train, validation, test, task, columns, labels, report, name)
    _describe(splits, lengths)
    return splits


def _picked(raw: Raw, split: str | None, name: str) -> Raw:
    """Only the asked-for split, as a source without splits; so is a source with one split of any name."""
    if split is not None:
        if split_name(split) not in raw.parts:
            raise UnknownName(
                f"{name} has no split {split!r}.",
                nearest=[p for p in raw.parts if p] or ["it has no splits"],
                next_step="split= one of these, or leave it out and veneer cuts them",
            )
        return replace(raw, parts={"": raw.parts[split_name(split)]})
    if len(raw.parts) == 1:
        return replace(raw, parts={"": next(iter(raw.parts.values()))})
    strange = [part for part in raw.parts if part not in SPLITS]
    if "train" not in raw.parts:
        raise BadData(
            f"{name} has the splits {', '.join(raw.parts)}, and none to train on.",
            nearest=nearest("train", raw.parts),
            next_step="split=NAME reads one of them and cuts it anew",
        )
    notes = [*raw.notes, *(f"the split {part!r} was left out" for part in strange)]
    return replace(raw, parts={p: rows for p, rows in raw.parts.items() if p in SPLITS}, notes=notes)


def _unfolded(raw: Raw) -> Raw:
    """A column `translation` of {language: text} pairs, as many sets have it, becomes source and target."""
    for part in raw.parts.values():
        for at, (line, row) in enumerate(part):
            pair = row.get("translation")
            if isinstance(pair, dict) and len(pair) == 2 and "source" not in row:
                rest = {k: v for k, v in row.items() if k != "translation"}
                part[at] = (line, {**rest, **dict(zip(("source", "target"), pair.values()))})
    return raw


def _roles(raw: Raw, rows: list[Row], how: Reading) -> tuple[str, dict[str, Any]]:
    """(task, {role: column}): what the source says of itself holds unless the caller says otherwise."""
    given = parse_columns(how.columns)
    agrees = how.task in (None, raw.task) and all(role in raw.columns for role in given)
    known = raw.columns if agrees and how.labelled else {}
    task = how.task or (raw.task if not given else None)
    return choose(rows, {**known, **given}, task, how.labelled)


def _cleaned(part: Part, split: str, how: Reading, report: DataReport) -> Part:
    good: Part = []
    bad: list[Problem] = []
    for line, row in part:
        try:
            good.extend((line, made) for made in cleaned(row, report.task, report.columns, how.labelled))
        except BadRow as error:
            bad.append(Problem(error.kind, str(error), line, split, row))
    if split and not good and bad and all(problem.kind == "missing label" for problem in bad):
        report.notes.append(f"the split {split!r} has no labels at all and was left out")
        return []
    report.problems.extend(bad)
    return good


def _known_only(
    parts: dict[str, Part], role: str, known: Sequence[str] | None, problems: list[Problem]
) -> list[str]:
    """The names of the labels in order; rows with other labels become problems.

    The names are the known ones, else those of the training rows: what only a test has cannot be learned.
    """
    if known is None:
        source = parts.get("train") or parts.get("") or []
        known = sorted({label for _, row in source for label in _as_list(row[role])}, key=_in_order)
    names = set(known)
    for split, part in parts.items():
        kept: Part = []
        for line, row in part:
            strange = [label for label in _as_list(row[role]) if label not in names]
            if strange:
                near_names = ", ".join(nearest(strange[0], known)) or ", ".join(known[:5])
                message = f"{strange[0]!r:.60} is not among the labels (nearest: {near_names})"
                problems.append(Problem("unknown label", message, line, split, row))
            else:
                kept.append((line, row))
        parts[split] = kept
    return list(known)


def _as_list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def _in_order(label: str) -> tuple[int, float, str]:
    """Numbers by size, before names by the alphabet."""
    found = number(label)
    return (1, 0.0, label) if found is None else (0, found, label)


def _measured(parts: dict[str, Part], how: Reading, report: DataReport) -> dict[int, int]:
    """{id(row): length}, in tokens where there is a tokenizer; rows above `max_length` become problems."""
    report.length_unit = "words" if how.tokenizer is None else "tokens"
    lengths: dict[int, int] = {}
    for split, part in parts.items():
        kept: Part = []
        for line, row in part:
            if how.tokenizer is None or report.task in ("image-classify", "speech", "vqa"):
                length = length_of(row, report.task)
            else:
                length = tokens_of(row, report.task, how.tokenizer)
                if how.max_length is not None and length > how.max_length:
                    message = f"{length:,} tokens, more than {how.max_length:,}"
                    report.problems.append(Problem("too long", message, line, split, row))
                    continue
            lengths[id(row)] = length
            kept.append((line, row))
        parts[split] = kept
    if how.tokenizer is None and lengths and max(lengths.values()) == 1:  # sequences, formulas
        report.length_unit = "characters"
        return {id(row): len(text_of(row, report.task)) for part in parts.values() for _, row in part}
    return lengths


def _describe(splits: Splits, lengths: dict[int, int]) -> None:
    """Counts, label balance, lengths, and what is worth knowing though not wrong."""
    report = splits.report
    assert report is not None
    report.counts = {split: len(rows) for split, rows in splits.parts.items()}
    if any(lengths.values()):  # pictures and sounds have none
        report.lengths = {
            s: spread([lengths[id(r)] for r in rows]) for s, rows in splits.parts.items() if rows
        }
    if splits.labels and splits.task in LABEL_ROLES:
        report.labels = count_labels(splits.parts, splits.labels, LABEL_ROLES[splits.task])
        totals = {label: sum(by_split.values()) for label, by_split in report.labels.items()}
        most, least = max(totals, key=totals.__getitem__), min(totals, key=totals.__getitem__)
        if totals[most] > 20 * totals[least]:
            report.notes.append(
                f"unbalanced: label {most!r} has {totals[most]:,} of {sum(totals.values()):,}, "
                f"label {least!r} {totals[least]:,}"
            )
    _note_copies(splits, report)


def _note_copies(splits: Splits, report: DataReport) -> None:
    if splits.task not in ("classify", "regress"):
        return
    labels_of: dict[str, list[Any]] = {}
    for rows in splits.parts.values():
        for row in rows:
            labels_of.setdefault(near(text_of(row, splits.task)), []).append(row.get("label"))
    several = [found for found in labels_of.values() if len(found) > 1]
    if several:
        unlike = sum(len(set(found)) > 1 for found in several)
        report.notes.append(
            f"{len(several):,} texts occur more than once (never in two splits), {unlike:,} unlike in label"
        )


def _hold_usable(splits: Splits, labelled: bool, some_were_bad: bool) -> None:
    if len(splits) == 0:
        raise BadData(
            f"{splits.spec} has no rows{' left' if some_were_bad else ''}.", next_step="give it some rows"
        )
    if labelled and splits.task in ("classify", "image-classify") and len(splits.labels) < 2:
        raise BadData(
            f"{splits.spec} has one label only, {splits.labels[0]!r}: there is nothing to tell apart.",
            next_step="data with at least two labels, or another label column: --columns label=COLUMN",
        )
