"""`veneer predict`: what an adapter says about texts or about the rows of a file."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from veneer.cli._common import AsJson, Columns, Debug, Device, Dtype, Matmul, Quiet, result, still
from veneer.cli._table import cut, terminal_width
from veneer.errors import BadOption

EXAMPLES = (
    'veneer predict --adapter runs/one "a film to remember"',
    "veneer predict --adapter runs/one --input reviews.csv --columns text=body --json",
)


def predict(
    adapter: Annotated[str, typer.Option("--adapter", help="a folder that train or compare wrote")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="texts; - reads lines")
    ] = None,
    input: Annotated[
        str | None, typer.Option("--input", help="a file, a folder or builtin:NAME instead of texts")
    ] = None,
    columns: Columns = None,
    model: Annotated[str | None, typer.Option("--model", help="another place of the base")] = None,
    task: Annotated[str | None, typer.Option(help="for folders that name no task")] = None,
    batch_size: Annotated[int, typer.Option(help="rows at a time")] = 64,
    device: Device = None,
    dtype: Dtype = None,
    matmul: Matmul = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Labels with probabilities, tags, numbers or texts, one for each text or row."""
    if bool(texts) == bool(input):
        raise BadOption(
            "veneer predict takes texts or --input FILE, one of them.",
            next_step='veneer predict --adapter DIR "a text"',
        )
    from veneer.training import Predictor

    still()
    opened = Predictor.open(adapter, model=model, task=task, device=device, dtype=dtype, matmul=matmul)
    given = [line.rstrip("\n") for line in sys.stdin if line.strip()] if texts == ["-"] else list(texts or ())
    reading = {"columns": columns} if columns else {}
    if input:
        from veneer import data

        rows: list[Any] = data.read(input, task=opened.task.name, labelled=False, **reading).test
    else:
        rows = given
    found = opened.predict(rows, batch_size=batch_size)
    shown = [row if isinstance(row, str) else _shown(row) for row in rows]
    lines = [line_of(p, text) for p, text in zip(found, shown)]
    predictions = [{**p, "text": text} for p, text in zip(found, shown)]
    result({"adapter": adapter, "task": opened.task.name, "predictions": predictions}, "\n".join(lines))


def _shown(row: Any) -> str:
    return " | ".join(str(v) for k, v in row.items() if isinstance(v, str) and k != "label")


def line_of(prediction: dict[str, Any], text: str, width: int | None = None) -> str:
    """One prediction on one line: what is predicted, how sure, of which text."""
    said = prediction["prediction"]
    width = width or terminal_width()
    if isinstance(said, str) and not prediction.get("probabilities"):
        return said
    probabilities = prediction.get("probabilities")
    if isinstance(probabilities, dict):
        names = said if isinstance(said, list) else [said]
        said = (
            ", ".join(f"{name} {probabilities[name]:.3f}" for name in names if name in probabilities)
            or "none"
        )
    elif isinstance(said, float):
        said = f"{said:.4g}"
    elif isinstance(said, list):
        return " ".join(str(tag) for tag in said)
    return f"{said}  {cut(text, max(20, width - len(str(said)) - 2))}".rstrip()
