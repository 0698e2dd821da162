"""Reading files into rows: CSV, TSV, JSON lines, JSON, Parquet.

A reader never guesses what a row means; it gives (line number, row) pairs and the problems it met, and goes
on behind each. What cannot be read at all is an error; what is wrong with one line is a `Problem` of it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.data._report import Problem
from veneer.errors import BadData, missing_package

Numbered = list[tuple[int, dict[str, Any]]]
LONGEST_FIELD = 1 << 27  # bytes of one CSV field: a whole book fits


@dataclass
class Raw:
    """Rows as they stand in the source. parts: {split or "" where the source has none: numbered rows}.

    columns, task, labels ({column: names}), group, sizes: what the source itself knows; a caller's word goes
    before. drop_copies: its splits are known to share rows, which leave the training rows without a word.
    """

    parts: dict[str, Numbered]
    problems: list[Problem] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)
    task: str | None = None
    labels: dict[str, list[str]] = field(default_factory=dict)
    group: str | None = None
    sizes: dict[str, float] | None = None
    drop_copies: bool = False
    notes: list[str] = field(default_factory=list)


def read_csv(data: bytes, split: str = "", delimiter: str = "") -> tuple[Numbered, list[Problem]]:
    """Comma-separated values with a header line; semicolons where the header has no comma."""
    text = _text(data)
    header = text.lstrip().split("\n", 1)[0]
    delimiter = delimiter or next((d for d in ",;\t" if d in header), ",")
    if delimiter == "\t":  # tab-separated files of two habits: quoted as CSV is, or with free quotes
        rows, problems = _csv(text, split, delimiter, csv.QUOTE_MINIMAL)
        return (rows, problems) if not problems else _csv(text, split, delimiter, csv.QUOTE_NONE)
    return _csv(text, split, delimiter, csv.QUOTE_MINIMAL)


def read_tsv(data: bytes, split: str = "") -> tuple[Numbered, list[Problem]]:
    return read_csv(data, split, "\t")


def _csv(text: str, split: str, delimiter: str, quoting: int) -> tuple[Numbered, list[Problem]]:
    rows: Numbered = []
    problems: list[Problem] = []
    header: list[str] = []
    usual_limit = csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    try:
        while True:
            first = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                problems.append(Problem("quotes", f"{error}, in the field that begins here", first, split))
                continue
            if not any(fields):
                continue
            if not header:
                header = _header(fields)
            elif len(fields) != len(header):
                message = f"{len(fields)} fields where the header has {len(header)}"
                problems.append(Problem("ragged", message, first, split, delimiter.join(fields)))
            else:
                rows.append((first, dict(zip(header, fields))))
    finally:
        csv.field_size_limit(usual_limit)
    return rows, problems


def _header(fields: list[str]) -> list[str]:
    names = [name.strip() or f"column_{i}" for i, name in enumerate(fields, 1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadData(
            f"the header names {', '.join(map(repr, twice))} more than once.",
            next_step="give every column a name of its own in the first line",
        )
    return names


def read_jsonl(data: bytes, split: str = "") -> tuple[Numbered, list[Problem]]:
    """One JSON object a line; empty lines are passed over."""
    rows: Numbered = []
    problems: list[Problem] = []
    for number, line in enumerate(_text(data).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(Problem("json", f"not JSON: {error}", number, split, line))
            continue
        if isinstance(value, dict):
            rows.append((number, value))
        else:
            problems.append(Problem("json", f"a {type(value).__name__}, not an object", number, split, line))
    return rows, problems


def read_json(data: bytes, split: str = "") -> tuple[Numbered, list[Problem]]:
    """A list of objects, an object whose one long list is under "data" or alike, or JSON lines."""
    try:
        value = json.loads(_text(data))
    except (ValueError, RecursionError):
        return read_jsonl(data, split)
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        raise BadData(
            "the file holds one JSON value; expected a list of objects, or one object a line.",
            next_step='[{"text": ..., "label": ...}, ...], or the same objects one a line in a file.jsonl',
        )
    problems = [
        Problem("json", f"a {type(row).__name__}, not an object", number, split, row)
        for number, row in enumerate(value, 1)
        if not isinstance(row, dict)
    ]
    return [(n, row) for n, row in enumerate(value, 1) if isinstance(row, dict)], problems


def read_parquet(data: bytes, split: str = "") -> tuple[Numbered, list[Problem]]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise missing_package("pyarrow", "train", "reading Parquet") from error
    try:
        rows = parquet.read_table(io.BytesIO(data)).to_pylist()
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise BadData(
            f"the file is not readable as Parquet: {error}",
            next_step="the file copied again, or as CSV or JSONL",
        ) from error
    return list(enumerate(rows, 1)), []


READERS: dict[str, Callable[..., tuple[Numbered, list[Problem]]]] = {
    ".csv": read_csv, ".tsv": read_tsv, ".tab": read_tsv, ".jsonl": read_jsonl, ".ndjson": read_jsonl,
    ".json": read_json, ".parquet": read_parquet,
}  # fmt: skip


def read_table(path: Path, split: str = "") -> tuple[Numbered, list[Problem]]:
    """The rows of a file, by its ending, as they stand there, and the problems met. Errors: BadData."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise BadData(
            f"{path.name} has the ending {path.suffix!r}, which veneer does not read.",
            nearest=list(READERS),
            next_step="veneer check DATA.jsonl    after one of these endings",
        )
    return reader(path.read_bytes(), split)


def _text(data: bytes) -> str:
    """UTF-8, or UTF-16 where a byte order mark says so. Bytes that do not decode become lone surrogates.

    They are found again row by row, which gives their line numbers.
    """
    if data[:4] in (b"PAR1", b"PK\x03\x04") or data[:2] == b"\x1f\x8b":
        kind = {b"P": "a Parquet or zip file", b"\x1f": "a gzip file"}[data[:1]]
        raise BadData(
            f"the contents are those of {kind}, not text.", next_step="give the file its right ending"
        )
    if data[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-8-sig", errors="surrogateescape")
    try:
        return data.decode("utf-16")
    except UnicodeDecodeError as error:
        raise BadData(
            f"the file begins as UTF-16 does, but is not: {error.reason} at byte {error.start}.",
            next_step="convert the file to UTF-8",
        ) from error
