"""The file of a cohort: TOML, the base and what holds for all at the top, a table for each member.

model = "builtin:minilm"
data = "reviews.csv"

[short]
method = "lora:rank=4"

[other]
method = "ia3"
data = "letters.csv"
learning_rate = 1e-3
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.errors import BadFile, BadOption

OF_THE_BASE = ("model", "output", "dtype", "quantise", "matmul", "device")
OF_THE_DATA = ("columns", "group", "sizes", "split", "skip_bad_rows")


def read_cohort(path: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(what holds for all, {name: the member's own options}), as `train_cohort` takes them.

    Raises BadFile where the file cannot be read (with the line), BadOption where it names no member.
    """
    path = Path(path).expanduser()
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise BadFile(
            f"{path} is no TOML: {error}.", next_step="texts are quoted, lists are [a, b], a member is [name]"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8"
        raise BadFile(
            f"the cohort's file {path} cannot be read: {reason}.",
            next_step='a TOML file: model = "...", and a table [name] for each member',
        ) from None
    shared = {name: value for name, value in found.items() if not isinstance(value, Mapping)}
    members = {name: dict(value) for name, value in found.items() if isinstance(value, Mapping)}
    if not members:
        raise BadOption(
            f"{path} names no member.", next_step='[first]    and under it method = "lora:rank=8"'
        )
    for name, own in members.items():
        for option in own:
            if option in OF_THE_BASE:
                raise BadOption(
                    f"{path}: member '{name}' has {option} = {own[option]!r}, which is one for all of a cohort.",
                    next_step=f"{option} = ...    above the first table",
                )
    return _with_data_options(shared), {name: _with_data_options(own) for name, own in members.items()}


def _with_data_options(given: dict[str, Any]) -> dict[str, Any]:
    """What says how the data are read, apart from what says how they are trained on."""
    reading = {name: given.pop(name) for name in OF_THE_DATA if name in given}
    return {**given, "data_options": reading} if reading else given
