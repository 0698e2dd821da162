"""Results made elsewhere: the same statistics and report, so that nobody has to train with veneer to use them.

`foreign` reads the files. With a score for each item, arms are paired by item and seed as in a comparison that
was run here. With one number a run less can be said, and what cannot is said too. `scores.jsonl` of a compare
folder is such a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from veneer.comparing.foreign import Found, read_runs
from veneer.comparing.inference.scores import RunScores
from veneer.comparing.planning.arms import Arm
from veneer.comparing.planning.design import Comparison
from veneer.comparing.publishing.records import Record
from veneer.comparing.results import CompareResult, publish
from veneer.errors import BadData, BadOption, UnknownName, nearest


def from_results(
    path: str | Path | Sequence[str | Path],
    *,
    output: str | Path | None = None,
    metric: str | None = None,
    higher_is_better: bool | None = None,
    columns: Mapping[str, str] | None = None,
    items: int | None = None,
    contrasts: Sequence[tuple[str, str]] = (),
    correction: str = "holm",
    smallest_effect: float = 0.01,
) -> CompareResult:
    """Analyse results made elsewhere; write results.jsonl, summary.json and report.html into `output`.

    path: one file or several (see `foreign.read_runs`): CSV, TSV, JSONL or Parquet with a line an item or a run,
    trainer_state.json, *_results.json, saved predictions (.npz), PEFT's benchmark files, a folder of these, or a
    pattern with {arm} and {seed}. columns: {role: column} where names differ. items: of how many right-or-wrong
    test items each number is the share, where there is one number a run. higher_is_better: by default True
    for scores of items, and for one number a run what the metric is known for. output: by default a
    folder beside the file, `NAME-compared`.

    Arms that ran with the same seeds are paired run by run, others by item alone. Errors: BadData with file, line
    and column.
    """
    if items is not None and items < 2:
        raise BadOption(
            f"items={items}: expected the number of test items, at least 2.", next_step="--items 1000"
        )
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    found, notes = read_runs(paths, columns or {}, metric)
    arms = sorted({run.arm for run in found})
    if len(arms) < 2:
        raise BadData(
            f"{_named(paths)} holds one arm, '{arms[0]}': expected at least 2 to compare.",
            next_step="name the arm of each line, or files of several arms: runs/{arm}/seed-{seed}/scores.csv",
        )
    for first, second in contrasts:
        for name in (first, second):
            if name not in arms:
                raise UnknownName(
                    f"{_named(paths)} has no arm '{name}'.",
                    nearest=nearest(name, arms) or arms[:5],
                    next_step="name arms as the file does",
                )
    measured = {run.metric for run in found if not run.failed}
    metric = metric or (measured.pop() if len(measured) == 1 else "score")
    records = [_record(name, found, metric) for name in arms]
    scores = _run_scores(found, items)
    rise = (scores is None or _rises(metric)) if higher_is_better is None else higher_is_better
    seeds = [tuple(line["seed"] for line in record.lines) for record in records]
    design = Comparison(
        model="",
        data=_named(paths),
        arms=tuple(arms),
        rates={},
        metric=metric,
        higher_is_better=rise,
        budget="published",
        seeds=max(seeds, key=len),
        tuning_seeds=(),
        contrasts=tuple((first, second) for first, second in contrasts),
        correction=correction,
        smallest_effect=smallest_effect,
        data_sha256=_digest(found),
    )
    folder = Path(output) if output is not None else _beside(Path(paths[0]))
    folder.mkdir(parents=True, exist_ok=True)
    return publish(
        folder,
        design,
        None,
        records,
        reads=1,
        source=_named(paths),
        scores_rise=rise,
        scores=scores,
        notes=[*notes, *(_what_runs_say(scores) if scores is not None else [])],
    )


def _named(paths: Sequence[str | Path]) -> str:
    name = Path(paths[0]).name
    return name if len(paths) == 1 else f"{name} and {len(paths) - 1} more"


def _beside(path: Path) -> Path:
    while any(mark in path.name for mark in "{*?"):
        path = path.parent
    return path.with_name(path.stem + "-compared")


def _rises(metric: str) -> bool:
    from veneer.tasks.metrics import METRICS

    return METRICS[metric].greater_is_better if metric in METRICS else True


def _digest(found: Sequence[Found]) -> str:
    """Of what was read, whatever file it stood in."""
    plain = sorted((run.arm, run.seed, run.value, sorted(run.items.items())) for run in found)
    return hashlib.sha256(json.dumps(plain, default=str).encode()).hexdigest()


def _run_scores(found: Sequence[Found], items: int | None) -> RunScores | None:
    """One number a run, or None where the items are known. Errors: BadData where nothing can be said."""
    runs = [run for run in found if not run.failed]
    with_items = [run for run in runs if run.items]
    if with_items and len(with_items) < len(runs):
        other = next(run for run in runs if not run.items)
        raise BadData(
            f"{with_items[0].place} has a score for each item, {other.place} one for a whole run.",
            next_step="compare runs of one kind; a whole run is what both can be",
        )
    if with_items or not runs:
        return None
    counted = {run.right_or_wrong for run in runs}
    known = items if items is not None else counted.pop() if len(counted) == 1 else None
    values = [run.value for run in runs if run.value is not None]
    if known is not None and not all(0 <= value <= 1 for value in values):
        raise BadData(
            f"items={known} says that scores are shares of right items, but they reach from {min(values):.4g} to "
            f"{max(values):.4g}.",
            next_step="give shares between 0 and 1, or leave --items out",
        )
    of: dict[str, Any] = {}
    seeds: dict[str, tuple[str, ...]] = {}
    for run in sorted(runs, key=lambda run: (run.arm, _seed_order(run.seed))):
        of.setdefault(run.arm, []).append([run.value])
        seeds[run.arm] = (*seeds.get(run.arm, ()), run.seed)
    single = [arm for arm, rows in of.items() if len(rows) == 1]
    if single and known is None:
        raise BadData(
            f"'{single[0]}' has one run and no items: nothing says how much of a difference is luck.",
            next_step="--items N where scores are shares of N right-or-wrong test items; more seeds; or item scores",
        )
    return RunScores(
        {arm: np.array(rows, dtype=np.float64) for arm, rows in of.items()}, seeds, ("run",), known
    )


def _what_runs_say(scores: RunScores) -> list[str]:
    seeds = min(len(rows) for rows in scores.seeds.values())
    known = scores.right_or_wrong
    said = [
        f"Intervals count {known} right-or-wrong items for each number, as if every arm had items of its own: which "
        "of them both arms got right is not known. They are wider than paired ones, and show only large differences."
        if known
        else "Intervals are over seeds alone and hold for these test items; other items may order the arms differently."
    ]
    if seeds == 1:
        said.append(
            "There is one run an arm, so that nothing is known of how a repeated training would differ."
        )
    return said


def _record(name: str, found: Sequence[Found], metric: str) -> Record:
    record = Record(Arm(name))
    runs = sorted((run for run in found if run.arm == name), key=lambda run: _seed_order(run.seed))
    failed = [run for run in runs if run.failed]
    if failed:
        record.status, record.reason = "failed", f"{failed[0].place}: {failed[0].failed}"
        runs = [run for run in runs if not run.failed]
    for run in runs:
        costs = {key: int(v) if v == int(v) else v for key, v in run.costs.items()}
        record.lines.append({"seed": run.seed, "status": "ok", "reason": "", **costs})
        items = [{"item": item, **line} for item, line in sorted(run.items.items())]
        record.opened.append({"metrics": {} if run.value is None else {metric: run.value}, "items": items})
    return record


def _seed_order(seed: str) -> tuple[int, float, str]:
    return (0, float(seed), "") if seed.lstrip("-").isdigit() else (1, 0.0, seed)
