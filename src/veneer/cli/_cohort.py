"""`veneer train --cohort FILE`: several adapters over one base, a folder each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.cli._common import human, note, result, still
from veneer.errors import BadOption


def train_members(file: str, given: Mapping[str, Any], quiet: bool) -> int:
    """Train the members that the file names. given: flags, which hold for all. Returns how many stopped."""
    from veneer.cli._card import write_card
    from veneer.cli.train import summary
    from veneer.training import read_cohort, train_cohort

    shared, members = read_cohort(file)
    shared |= {name: value for name, value in given.items() if value is not None}
    missing = [name for name in ("model", "output") if not shared.get(name)]
    if missing:
        raise BadOption(
            f"the cohort of {file} has no {' and no '.join(missing)}.",
            next_step=f'--{missing[0]} ..., or {missing[0]} = "..." at the top of the file',
        )
    still()
    note(f"{len(members)} members over {shared['model']}: {', '.join(members)}")
    found = train_cohort(members, progress=not quiet, **shared)
    for name in found.results:
        write_card(str(Path(shared["output"]).expanduser() / name), None)
    value = {
        "members": {name: summary(each) for name, each in found.results.items()},
        "failed": {name: str(error) for name, error in found.failed.items()},
    }
    result(value, _text(found))
    return len(found.failed)


def _text(found: Any) -> str:
    from veneer.cli._table import table, terminal_width

    rows = []
    for name, each in found.results.items():
        split = next(iter(each.metrics), "")
        value = each.metrics[split][each.primary_metric] if split else None
        shown = "" if value is None else f"{split} {each.primary_metric} {value:.4g}"
        rows.append((name, each.method, shown, f"{each.steps:,}", human(each.bytes_on_disk), each.folder))
    lines = [table(("member", "method", "score", "steps", "saved", "folder"), rows, width=terminal_width(),
                   drop=("saved", "steps"), right=("steps", "saved"))] if rows else []  # fmt: skip
    for name, error in found.failed.items():
        lines += ["", f"{name} stopped: {error}"]
    return "\n".join(lines)
