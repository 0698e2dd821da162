"""`veneer export`: an adapter in another program's format."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.cli._common import AsJson, Debug, Dtype, Quiet, result, still

EXAMPLES = (
    "veneer export --adapter runs/one --format peft --output runs/one-peft",
    "veneer export --adapter runs/two --format gguf --output runs/two-gguf",
    "veneer export --adapter runs/two --for vllm --output runs/two-vllm",
)


def export(
    adapter: Annotated[str, typer.Option("--adapter", help="a folder that train or compare wrote")],
    output: Annotated[str, typer.Option("--output", help="the folder for the other format")],
    format: Annotated[
        str,
        typer.Option("--format", "--for", help="peft, adapterhub, gguf; vllm, sglang: as LoRA of one rank"),
    ] = "peft",
    rank: Annotated[int | None, typer.Option(help="of vllm, sglang: else the smallest exact one")] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error", help="of vllm and sglang: the part of a module's change that may be lost"
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="another place of the base")] = None,
    task: Annotated[str | None, typer.Option(help="for folders that name no task")] = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write an adapter in another program's format; the report says what it keeps and what it changes."""
    from veneer import engine
    from veneer.errors import BadOption, UnknownName, nearest
    from veneer.training import Predictor

    if format not in engine.FORMATS:
        raise UnknownName(
            f"no format is called '{format}'.", nearest=nearest(format, engine.FORMATS) or tuple(engine.FORMATS),
            next_step=f"--format {', '.join(engine.FORMATS)}",
        )  # fmt: skip
    still()
    opened = Predictor.open(adapter, model=model, task=task, device="cpu", dtype=dtype)
    options = {k: v for k, v in (("rank", rank), ("max_error", max_error)) if v is not None}
    if options and format not in ("vllm", "sglang"):
        raise BadOption(
            f"--{next(iter(options)).replace('_', '-')} is of --for vllm and sglang, not of {format}.",
            next_step=f"veneer export --adapter {adapter} --for vllm --output {output}",
        )
    report = engine.export(opened.model, opened.name, output, format=format, **options)
    plain = (
        report.to_dict()
        if hasattr(report, "to_dict")
        else {"report": None if report is None else str(report)}
    )
    result({"adapter": adapter, "format": format, "output": output, **plain},
           f"{report}\nsaved    {output}" if report is not None else f"saved    {output}")  # fmt: skip
