"""Results made elsewhere: the same statistics and report over a file with a line an item.

A line has `arm`, `seed` (0 if there is only one), `item`, `score`, and where they are known the costs
(`trainable_parameters`, `step_seconds`, ...), on any line of a run. JSON lines or CSV; `scores.jsonl` of a
compare folder is such a file.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from veneer.comparing.arms import Arm
from veneer.comparing.design import Comparison
from veneer.comparing.results import CompareResult, Record, publish
from veneer.comparing.runs import COSTS
from veneer.errors import BadData, UnknownName

NEEDED = ("arm", "item", "score")


def from_results(
    path: str | Path,
    *,
    output: str | Path | None = None,
    metric: str = "score",
    higher_is_better: bool = True,
    contrasts: Sequence[tuple[str, str]] = (),
    correction: str = "holm",
    smallest_effect: float = 0.01,
) -> CompareResult:
    """Analyse the scores in `path` and write results.jsonl, summary.json and report.html into `output`.

    output: by default a folder beside the file, `NAME-compared`. Arms that ran with the same seeds are paired
    run by run, others by item alone. Errors: BadData with counts and line numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise BadData(f"there is no file {path}.", next_step="veneer compare --from FILE, a line an item")
    runs = _read(path)
    arms = sorted({arm for arm, _ in runs})
    for first, second in contrasts:
        for name in (first, second):
            if name not in arms:
                raise UnknownName(
                    f"{path} has no arm '{name}'.", nearest=arms[:5], next_step="name arms as the file does"
                )
    records = [_record(name, runs) for name in arms]
    seeds = [tuple(line["seed"] for line in record.lines) for record in records]
    design = Comparison(
        model="",
        data=str(path.name),
        arms=tuple(arms),
        rates={},
        metric=metric,
        higher_is_better=higher_is_better,
        budget="published",
        seeds=max(seeds, key=len),
        tuning_seeds=(),
        contrasts=tuple((first, second) for first, second in contrasts),
        correction=correction,
        smallest_effect=smallest_effect,
        data_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    folder = Path(output) if output is not None else path.with_name(path.stem + "-compared")
    folder.mkdir(parents=True, exist_ok=True)
    return publish(folder, design, None, records, reads=1, source=path.name, scores_rise=higher_is_better)


def _read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """{(arm, seed): {"scores": {item: score}, "costs": {...}}}"""
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    wrong: list[str] = []
    for number, line in _lines(path):
        problem = _problem(line)
        if problem is None:
            run = runs.setdefault((str(line["arm"]), str(line.get("seed", 0))), {"scores": {}, "costs": {}})
            item = str(line["item"])
            if item in run["scores"]:
                problem = f"item '{item}' is there twice for this arm and seed"
            run["scores"][item] = float(line["score"])
            run["costs"] |= {key: float(line[key]) for key in COSTS if line.get(key) not in (None, "")}
        if problem is not None:
            wrong.append(f"line {number}: {problem}")
    if wrong or not runs:
        shown = "; ".join(wrong[:5]) or "it is empty"
        raise BadData(
            f"{path} cannot be analysed, {len(wrong)} bad lines ({shown}).",
            next_step='a line is {"arm": "lora", "seed": 1, "item": "17", "score": 1.0, ...}',
        )
    return runs


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() in (".csv", ".tsv"):
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            for row in reader:
                yield reader.line_num, row
            return
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                yield number, json.loads(text)
            except ValueError:
                yield number, None


def _problem(line: Any) -> str | None:
    if not isinstance(line, dict):
        return "not a JSON object"
    missing = [key for key in NEEDED if line.get(key) in (None, "")]
    if missing:
        return "no " + ", ".join(f"'{key}'" for key in missing)
    try:
        finite = math.isfinite(float(line["score"]))
    except (TypeError, ValueError):
        finite = False
    return None if finite else f"'score' is {line['score']!r}, expected a finite number"


def _record(name: str, runs: dict[tuple[str, str], dict[str, Any]]) -> Record:
    record = Record(Arm(name))
    for (arm, seed), run in runs.items():
        if arm != name:
            continue
        costs = {key: int(v) if v == int(v) else v for key, v in run["costs"].items()}
        record.lines.append({"seed": seed, "status": "ok", "reason": "", **costs})
        items = [{"item": item, "score": score} for item, score in sorted(run["scores"].items())]
        record.opened.append({"metrics": {}, "items": items})
    order = sorted(range(len(record.lines)), key=lambda place: _seed_order(record.lines[place]["seed"]))
    record.lines = [record.lines[place] for place in order]
    record.opened = [record.opened[place] for place in order]
    return record


def _seed_order(seed: str) -> tuple[int, float, str]:
    return (0, float(seed), "") if seed.lstrip("-").isdigit() else (1, 0.0, seed)
