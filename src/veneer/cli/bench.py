"""`veneer bench`: side by side with HF PEFT."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.cli._common import AsJson, Debug, Device, Quiet, Seed, result

EXAMPLES = (
    "veneer bench",
    "veneer bench lora --json",
    "veneer bench matmul --save benchmarks/results/matmul.json --page docs/benchmarks.md",
)


def bench(
    cases: Annotated[list[str] | None, typer.Argument(help="cases; default: all of them")] = None,
    repeats: Annotated[int, typer.Option(help="samples of each side")] = 9,
    threads: Annotated[int, typer.Option(help="of torch; the expectations are about one")] = 1,
    save: Annotated[str | None, typer.Option(help="a file that takes the run as JSON")] = None,
    page: Annotated[
        str | None, typer.Option(help="a page, written from all runs (*.json) beside the saved one")
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Speed and memory side by side with HF PEFT, on this machine."""
    from veneer.bench import Size, run, write

    found = run(cases or None, device=device, quiet=quiet, size=Size(seed, repeats), threads=threads)
    write(found, save, page)
    result(found)
