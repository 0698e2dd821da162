"""Several tasks and bases in one file: one design for all, a comparison of its own for each pair of them.

Each pair has a folder, so that any of them can be looked at, resumed or left out by itself. All are designed, and
hashed together, before the first runs; what they say together stands in `across.json`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from veneer.comparing.inference.across import Across, across
from veneer.comparing.planning.design import canonical_json
from veneer.comparing.planning.file import write_comparison
from veneer.comparing.planning.forecast import duration
from veneer.comparing.planning.prepare import Prepared, prepare
from veneer.comparing.reporting.across_page import write_across
from veneer.comparing.results import CompareResult
from veneer.comparing.run import run_prepared
from veneer.comparing.running.ledger import write_atomic
from veneer.comparing.running.runs import Progress, print_progress
from veneer.errors import BadOption, TrainingFailed, VeneerError


def questions(fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{name of its folder: its own fields}, one for each data set and base; a single question has the name ""."""
    models: list[Any] = list(fields.get("models") or [fields.get("model")])
    data = fields.get("data")
    tables = [dict(table) for table in data or ()] if _is_tables(data) else [{"data": data}]
    common = {key: value for key, value in fields.items() if key not in ("models", "model", "data", "output")}
    found: dict[str, dict[str, Any]] = {}
    for table, model in product(tables, models):
        parts = [_short(table.get("name", table["data"]))] if len(tables) > 1 else []
        parts += [_short(model)] if len(models) > 1 else []
        name = "--".join(parts)
        if name in found:
            raise BadOption(
                f"two of the comparisons would have the folder '{name}'.",
                next_step="give one of the data sets another name: name = ... in its [[data]] table",
            )
        own = {key: value for key, value in table.items() if key != "name"}
        found[name] = {**common, "model": model, **own}
    return found


def _is_tables(data: Any) -> bool:
    return isinstance(data, list) and bool(data) and all(isinstance(t, Mapping) and "data" in t for t in data)


def _short(spec: Any) -> str:
    """`builtin:minilm` -> minilm, `/data/reviews.csv` -> reviews."""
    last = re.split(r"[:/\\]", str(spec).rstrip("/\\"))[-1]
    return re.sub(r"[^\w.-]+", "-", last.removesuffix(".csv").removesuffix(".jsonl")) or "data"


@dataclass
class Designs:
    """All comparisons of one question, before they run. fields: of the file that asks all of them."""

    of: Mapping[str, Prepared]
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        hashes = {name: prepared.design.sha256 for name, prepared in self.of.items()}
        return hashlib.sha256(canonical_json(hashes).encode()).hexdigest()

    @property
    def seconds(self) -> float | None:
        known = [prepared.forecast.seconds for prepared in self.of.values()]
        return None if any(one is None for one in known) else sum(one for one in known if one is not None)

    def measure(self, output: str | Path | None = None) -> Designs:
        for name, prepared in self.of.items():
            prepared.measure(None if output is None else Path(output) / name)
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "comparisons": {name: one.to_dict() for name, one in self.of.items()}}

    def __str__(self) -> str:
        runs = sum(prepared.forecast.runs for prepared in self.of.values())
        time = "" if self.seconds is None else f", about {duration(self.seconds)}"
        lines = [f"design {self.sha256}: {len(self.of)} comparisons, {runs} runs{time}"]
        for name, prepared in self.of.items():
            lines += ["", f"-- {name}", str(prepared)]
        return "\n".join(lines)


@dataclass(frozen=True)
class Several:
    """What all comparisons found: a result for each that has one, what they say together, and what failed."""

    folder: Path
    results: Mapping[str, CompareResult]
    together: Across | None
    failed: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "comparisons": {name: result.to_dict() for name, result in self.results.items()},
            "across": None if self.together is None else self.together.to_dict(),
            "failed": dict(self.failed),
        }

    def __str__(self) -> str:
        lines = [
            f"{name}: {result.sentence}\n  report: {result.report}" for name, result in self.results.items()
        ]
        lines += [f"{name}: {reason}" for name, reason in self.failed.items()]
        return "\n\n".join([*lines, *([] if self.together is None else [str(self.together)])])


def prepare_several(fields: Mapping[str, Any], **given: Any) -> Designs:
    """The designs of every data set and base of `fields`, which are those of a comparison file."""
    return Designs({name: prepare(**own, **given) for name, own in questions(fields).items()}, dict(fields))


def run_several(
    designs: Designs,
    output: str | Path,
    *,
    extend: bool = False,
    costs: bool = True,
    progress: Callable[[Progress], None] = print_progress,
) -> Several:
    """Run what is missing of every comparison, then put together what they found.

    One that fails stops none of the others. Errors: TrainingFailed where all did.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    write_comparison(folder / "comparison.toml", _file_fields(designs.fields), designs.sha256)
    hashes = {name: prepared.design.sha256 for name, prepared in designs.of.items()}
    plain = {"sha256": designs.sha256, "comparisons": hashes}
    write_atomic(folder / "design.json", json.dumps(plain, indent=2) + "\n")
    results: dict[str, CompareResult] = {}
    failed: dict[str, str] = {}
    for number, (name, prepared) in enumerate(designs.of.items(), start=1):
        progress(Progress(f"{name} ({number} of {len(designs.of)})"))
        try:
            results[name] = run_prepared(
                prepared, folder / name, extend=extend, costs=costs, progress=progress
            )
        except VeneerError as error:
            failed[name] = error.what
            progress(Progress(f"{name}: {error.what}"))
    if not results:
        raise TrainingFailed(
            f"none of {len(failed)} comparisons has a result ({'; '.join(failed.values())}).",
            next_step="mend the first of them; the same command then goes on",
        )
    return Several(folder, results, _together(folder, list(results)), failed)


def _together(folder: Path, names: Sequence[str]) -> Across | None:
    """What they say together, in across.json; None where there is one, or nothing that all of them have."""
    if len(names) < 2:
        return None
    try:
        found = across([folder / name for name in names])
    except VeneerError:
        return None
    found.write(folder)
    write_across(found.to_dict(), folder)
    return found


def _file_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != "output"}
