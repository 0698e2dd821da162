"""`veneer bench`: side by side with HF PEFT."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.cli._common import AsJson, Debug, Device, Quiet, result

EXAMPLES = ("veneer bench", "veneer bench lora --json")


def bench(
    cases: Annotated[list[str] | None, typer.Argument(help="cases; default: all of them")] = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Speed and memory side by side with HF PEFT, on this machine."""
    from veneer.bench import run

    result(run(cases or None, device=device, quiet=quiet))
