"""Data: reading files of every usual kind, checking them before anything trains, sets that packages carry.

Public: `read` (splits of clean rows), `check` (a report), `builtin_data`, `corrupt_row` (copies of test rows as
people and cameras spoil them), `domains_of` (test sets of other sources). Rows are plain dicts under the
names of roles; a label is a name, and `Splits.labels` puts the names in order.
"""

from veneer.data._builtin import BUILTINS
from veneer.data._chat import messages_of
from veneer.data._columns import TASKS, parse_columns
from veneer.data._formats import read_table
from veneer.data._near import NearCopies, without_near_copies
from veneer.data._read import check, read
from veneer.data._report import DataReport, Problem
from veneer.data._sets_python import DOMAIN_SETS
from veneer.data._splits import Splits
from veneer.data.corruption import corrupt_row, parse_corruptions


def builtin_data() -> dict[str, str]:
    """{name: what it is} of the sets that `builtin:NAME` reads."""
    return {name: row.about for name, row in BUILTINS.items()}


def domains_of(spec: str) -> list[str]:
    """The sets that `spec` stands for as test sets of other sources: `builtin:vader-domains` has four."""
    several = DOMAIN_SETS.get(spec.removeprefix("builtin:")) if spec.startswith("builtin:") else None
    return [spec] if several is None else [f"builtin:{name}" for name in several]


__all__ = [
    "TASKS",
    "DataReport",
    "NearCopies",
    "Problem",
    "Splits",
    "builtin_data",
    "check",
    "corrupt_row",
    "domains_of",
    "messages_of",
    "parse_columns",
    "parse_corruptions",
    "read",
    "read_table",
    "without_near_copies",
]
