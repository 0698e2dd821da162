"""The fields of a comparison from its file and the flags that were typed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.cli._common import extra_options
from veneer.errors import BadOption, UnknownOption, nearest


def fields_of(ctx: Any) -> dict[str, Any]:
    """The fields of the comparison: of the file, then of the flags that were typed."""
    from veneer.comparing.planning.file import FIELDS, checked, read_comparison

    file, arguments = split_file(ctx.args)
    found: dict[str, Any] = (
        {} if file is None else {"output": f"runs/{Path(file).stem}", **read_comparison(file)}
    )
    typed = [p.name for p in ctx.command.params if ctx.get_parameter_source(p.name).name == "COMMANDLINE"]
    flags = {name: ctx.params[name] for name in typed if name in FIELDS}
    if "contrast" in typed:
        flags["contrasts"] = [pair_of(text) for text in ctx.params["contrast"]]
    options = training_options(
        extra_options(arguments, "compare"), [o for p in ctx.command.params for o in p.opts]
    )
    if "model" in flags:
        found.pop("models", None)
    return found | checked(flags | options, "veneer compare")


def split_file(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """(the comparison file, the other arguments): the file is what no flag stands before."""
    for at, text in enumerate(arguments):
        is_value = at > 0 and arguments[at - 1].startswith("--") and "=" not in arguments[at - 1]
        if not text.startswith("-") and not is_value:
            return text, [*arguments[:at], *arguments[at + 1 :]]
    return None, list(arguments)


def pair_of(text: str) -> tuple[str, str]:
    from veneer.comparing.planning.arms import split_arms

    pair = split_arms(text)
    if len(pair) != 2:
        raise BadOption(f"--contrast {text!r} is not a pair of arms.", next_step="--contrast lora,dora")
    return pair[0], pair[1]


def training_options(given: dict[str, Any], flags: list[str]) -> dict[str, Any]:
    """Options of every training, after their names were looked up."""
    from veneer.comparing.planning.file import training_fields

    known = training_fields()
    for name in given:
        if name not in known:
            typed = "--" + name.replace("_", "-")
            names = [*flags, *("--" + n.replace("_", "-") for n in sorted(known))]
            raise UnknownOption(
                f"veneer compare has no option '{typed}'.", nearest=nearest(typed, names),
                next_step="options of a method belong to its arm: --methods lora:rank=16,dora",
            )  # fmt: skip
    if isinstance(given.get("whole"), str):
        given["whole"] = [given["whole"]]
    return given
