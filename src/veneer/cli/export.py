"""`veneer export`: an adapter in another program's format."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.cli._common import AsJson, Debug, Dtype, Quiet, result, still

EXAMPLES = (
    "veneer export --adapter runs/one --format peft --output runs/one-peft",
    "veneer export --adapter runs/two --format gguf --output runs/two-gguf",
)


def export(
    adapter: Annotated[str, typer.Option("--adapter", help="a folder that train or compare wrote")],
    output: Annotated[str, typer.Option("--output", help="the folder for the other format")],
    format: Annotated[str, typer.Option("--format", help="peft, adapterhub, gguf")] = "peft",
    model: Annotated[str | None, typer.Option("--model", help="another place of the base")] = None,
    task: Annotated[str | None, typer.Option(help="for folders that name no task")] = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write an adapter in another program's format; the report says what it keeps and what it changes."""
    from veneer import engine
    from veneer.errors import UnknownName, nearest
    from veneer.training import Predictor

    if format not in engine.FORMATS:
        raise UnknownName(
            f"no format is called '{format}'.", nearest=nearest(format, engine.FORMATS) or tuple(engine.FORMATS),
            next_step=f"--format {', '.join(engine.FORMATS)}",
        )  # fmt: skip
    still()
    opened = Predictor.open(adapter, model=model, task=task, device="cpu", dtype=dtype)
    report = engine.export(opened.model, opened.name, output, format=format)
    plain = (
        report.to_dict()
        if hasattr(report, "to_dict")
        else {"report": None if report is None else str(report)}
    )
    result({"adapter": adapter, "format": format, "output": output, **plain},
           f"{report}\nsaved    {output}" if report is not None else f"saved    {output}")  # fmt: skip
