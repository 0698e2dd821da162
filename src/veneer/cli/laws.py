"""`veneer laws`: what methods promise, checked on tiny bases."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from veneer.cli._common import AsJson, Debug, Quiet, note, result
from veneer.cli._table import table
from veneer.errors import UnknownMethod

EXAMPLES = ("veneer laws lora", "veneer laws lora vera --law merge --law rows --json")


def laws(
    methods: Annotated[list[str] | None, typer.Argument(help="default: all of them")] = None,
    law: Annotated[
        list[str] | None, typer.Option(help="a law by name or number; default: all of them")
    ] = None,
    base: Annotated[list[str] | None, typer.Option(help="a tiny base by name; default: all of them")] = None,
    names: Annotated[bool, typer.Option("--list", help="what the laws say, without running them")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run the laws that every method promises to hold; the exit code is 1 where one is broken."""
    import torch

    from veneer import testing
    from veneer.edits import lookup, registry

    if names:
        listed = sorted(testing.LAWS.values(), key=lambda each: each.number)
        rows: list[dict[str, Any]] = [
            {"number": each.number, "law": each.name, "meaning": each.meaning} for each in listed
        ]
        result(
            rows,
            table(
                ("", "law", "it says"),
                [(str(r["number"]), r["law"], r["meaning"]) for r in rows],
                right=("",),
            ),
        )
        return
    for key in methods or ():
        try:
            lookup(key)
        except UnknownMethod:
            if key in testing.LAWS:
                raise UnknownMethod(
                    f"'{key}' is a law, no method.", next_step=f"veneer laws --law {key}"
                ) from None
            raise
    torch.set_num_threads(1)  # the bases are tiny: threads would only wait for each other
    reports = []
    for key in methods or sorted(registry()):
        reports.append(testing.check_method(key, laws=law or None, bases=base or None))
        note(f"{key}: {'holds' if reports[-1].ok else 'BROKEN'}")
    result(testing.to_json(reports), "\n".join(_lines(reports, detailed=bool(methods))))
    if not all(report.ok for report in reports):
        raise typer.Exit(1)


def _lines(reports: list[Any], detailed: bool) -> list[str]:
    lines: list[str] = []
    for report in reports:
        shown = report.rows if detailed else report.failures
        lines.append(f"{report.method}: {_counts(report)}")
        if shown:
            cells = [(str(r.number), r.law, r.base, r.status, r.detail.split("\n")[0]) for r in shown]
            lines.append(table(("", "law", "base", "status", "detail"), cells, right=("",)))
        lines += [f"  {text}" for text in report.missing]
        if shown:
            lines.append("")
    return lines


def _counts(report: Any) -> str:
    found: dict[str, int] = {}
    for row in report.rows:
        found[row.status] = found.get(row.status, 0) + 1
    return ", ".join(f"{count} {status}" for status, count in found.items())
