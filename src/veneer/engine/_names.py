"""Names for rows: what a person gives, checked, as a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.errors import BadOption, Unsupported

from ._forms import check
from ._frame import Names, Session, names_in
from ._program import banks_of

UNSET: Any = object()  # no `adapters=` in the call; None is the bare base


def session_for(host: Any, names: Any, form: str | None = None, banks: bool = True) -> Session:
    """A session from what a person gives: a name, None, a list of names by row, or {stack: names by row}; a form.

    banks: for compiled code that may be called under it; eager code reads names alone.
    """
    if isinstance(names, Mapping):
        return Session(host, by_stack={s: _row_names(host, n) for s, n in names.items()}, form=check(form))
    if check(form) is not None and (names is None or isinstance(names, str)):
        names = [names]  # one name that serves every row
    if names is None or isinstance(names, str):
        chosen = () if names is None else (names,)
        _known(host, chosen)
        return Session(host, names=chosen, banks=banks_of(host, chosen) if banks else None)
    rows = _row_names(host, names)
    return Session(host, rows=rows, banks=banks_of(host, rows) if banks else None, form=form)


def _row_names(host: Any, names: Sequence[Any]) -> list[Names]:
    rows: list[Names] = []
    for n in names:
        row = () if n is None else (n,) if isinstance(n, str) else tuple(n)
        _known(host, row)
        rows.append(row)
    if not rows:
        raise BadOption(
            "names for the rows of a batch: the list is empty.", next_step='for example ["a", None, "b"]'
        )
    return rows


def _known(host: Any, names: Sequence[str]) -> None:
    for n in names:
        host.adapter(n)
        if n in host.merged:
            raise Unsupported(f"adapter '{n}' is merged into the base, so every row has it.",
                              next_step="veneer.unmerge(model) takes it out again")  # fmt: skip


def any_names(rows: Any) -> bool:
    return any(bool(r) for r in rows)


def adapters_of(host: Any, session: Session | None, rows: Any) -> dict[str, Any]:
    """The adapters of a call by name: those that a generation began with, else those that there are.

    rows: the names that the call came to; a session may have names of its own beside them.
    """
    own: dict[str, Any] = {}
    every = [rows]
    if session is not None:
        own = session.adapters or {}
        every += [session.rows, session.names, *(session.by_stack or {}).values()]
    return {n: own[n] if n in own else host.adapter(n) for n in names_in(*every)}
