"""`veneer bench`: side by side with HF PEFT."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Annotated

import typer

from veneer.cli._common import AsJson, Debug, Device, Quiet, result
from veneer.errors import Unsupported

EXAMPLES = ("veneer bench", "veneer bench lora --json")


def bench(
    cases: Annotated[list[str] | None, typer.Argument(help="cases; default: all of them")] = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Speed and memory side by side with HF PEFT, on this machine."""
    if importlib.util.find_spec("veneer.bench") is None:
        raise Unsupported("the benchmarks are not here yet.", next_step="veneer laws    runs what is")
    found = importlib.import_module("veneer.bench").run(
        cases or None, **({"device": device} if device else {})
    )
    result(found)
