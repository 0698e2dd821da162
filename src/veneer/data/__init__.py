"""Data: reading files of every usual kind, checking them before anything trains, sets that packages carry.

Public: `read` (splits of clean rows), `check` (a report), `builtin_data`. Rows are plain dicts under the
names of roles; a label is a name, and `Splits.labels` puts the names in order.
"""

from veneer.data._builtin import BUILTINS
from veneer.data._chat import messages_of
from veneer.data._columns import TASKS, parse_columns
from veneer.data._read import check, read
from veneer.data._report import DataReport, Problem
from veneer.data._splits import Splits


def builtin_data() -> dict[str, str]:
    """{name: what it is} of the sets that `builtin:NAME` reads."""
    return {name: row.about for name, row in BUILTINS.items()}


__all__ = [
    "TASKS",
    "DataReport",
    "Problem",
    "Splits",
    "builtin_data",
    "check",
    "messages_of",
    "parse_columns",
    "read",
]
