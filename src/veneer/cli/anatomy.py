"""`veneer anatomy`: the roles that were found in a model."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.cli._common import AsJson, Debug, Dtype, Quiet, note, result, still
from veneer.cli._table import table, terminal_width

EXAMPLES = ("veneer anatomy builtin:minilm", "veneer anatomy ./my-model --json")


def anatomy(
    model: Annotated[
        str, typer.Argument(help="folder, hub id, file.gguf, timm:NAME, builtin:NAME, module:PATH:FUNCTION")
    ],
    modules: Annotated[
        bool, typer.Option("--modules", help="name every module, not one for each role")
    ] = False,
    dtype: Dtype = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The roles found in a model: every place where an edit can sit, under the name that selectors use."""
    from veneer.anatomy import read
    from veneer.bases import open_base

    still()
    base = open_base(model, dtype=dtype)
    for text in base.notes:
        note(f"note: {text}")
    found = read(base.model)
    result(found, _text(found, modules))


def _text(found: object, modules: bool) -> str:
    if modules:
        lines = []
        for role, names in found.roles.items():  # type: ignore[attr-defined]
            lines += [role, *(f"  {name or '(the model)'}" for name in names)]
        return "\n".join(lines)
    title, head, *rest = str(found).split("\n")
    rows = [line for line in rest if not line.startswith("note: ")]
    notes = [line for line in rest if line.startswith("note: ")]
    if not rows or max(map(len, [head, *rows])) <= terminal_width():
        return str(found)
    starts = [head.index(name) for name in ("role", "sites", "for example", "shape")]
    ends = [*starts[1:], None]
    cells = [[line[a:b].strip() for a, b in zip(starts, ends)] for line in [head, *rows]]
    narrow = table(cells[0], cells[1:], drop=("for example",), right=("sites",))
    return "\n".join([title, narrow, *notes])
