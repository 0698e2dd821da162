"""`veneer check`: what is in some data and what is wrong with it."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.cli._common import AsJson, Columns, Debug, Quiet, result

EXAMPLES = (
    "veneer check reviews.csv",
    "veneer check reviews.csv --task classify --columns text=body,label=stars --json",
)


def check(
    data: Annotated[str, typer.Argument(help="CSV, TSV, JSONL, Parquet, a folder, a hub id, builtin:NAME")],
    task: Annotated[
        str | None, typer.Option(help="the task that it is for; default: found from its columns")
    ] = None,
    columns: Columns = None,
    group: Annotated[str | None, typer.Option(help="a column whose rows stay in one split")] = None,
    sizes: Annotated[str | None, typer.Option(help="of the splits: validation=500,test=0.1")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """What is in some data, and what is wrong with it: counts, labels, lengths, bad rows with their lines.

    The exit code is 1 where rows cannot be trained on.
    """
    from veneer import data as data_room

    given = {"columns": columns, "group": group, "sizes": sizes}
    report = data_room.check(data, task=task, **{k: v for k, v in given.items() if v is not None})
    result(report)
    if not report.ok:
        raise typer.Exit(1)
