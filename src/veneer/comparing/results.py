"""Results: from the records of runs to the files of a compare folder and what `compare` returns."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from veneer.comparing.inference.analysis import Analysis, Scores, analyse
from veneer.comparing.inference.cells import Cell
from veneer.comparing.inference.claims import decide
from veneer.comparing.inference.corpus import Anew, of_records
from veneer.comparing.inference.scores import RunScores
from veneer.comparing.measures.sections import sections
from veneer.comparing.planning.arms import OPTIONAL_CONTROLS, Arm
from veneer.comparing.planning.controls import judged
from veneer.comparing.planning.design import DEMO, Comparison, Forecast, forecast, parse_budget
from veneer.comparing.reporting.disagreements import most_disputed
from veneer.comparing.reporting.items import write_items
from veneer.comparing.reporting.report import write_report
from veneer.comparing.reporting.words import Scale, table_text
from veneer.comparing.running.ledger import write_atomic
from veneer.comparing.running.runs import COSTS
from veneer.errors import BadData

PARTS_NOTE = (
    "The metric is no mean over items: intervals and tests are of the metric itself, computed anew without each item "
    "in turn, and for each group and further set. Calibration is of single answers, as with every metric.",
)


KEPT = ("prediction", "label", "query", "group", "confidence")
"""What scores.jsonl keeps of an item beside its score."""


@dataclass
class Record:
    """All that is known of one arm: its trials, a line and an opened test result a seed, and its best run."""

    arm: Arm
    status: str = "ok"
    reason: str = ""
    learning_rate: float | None = None
    trials: list[dict[str, Any]] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    opened: list[dict[str, Any] | None] = field(default_factory=list)
    best: dict[str, Any] | None = None
    measured: dict[str, Any] = field(default_factory=dict)  # its costs, alone in a process (costs.py)

    @property
    def costs(self) -> dict[str, float | None]:
        """The median over seeds of each cost that was measured."""
        return {key: _median([line.get(key) for line in self.lines]) for key in COSTS}

    @property
    def tuning_seconds(self) -> float:
        return sum(line.get("seconds") or 0.0 for line in self.trials)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    middle = statistics.median(known)
    return int(middle) if all(isinstance(value, int) for value in known) and middle == int(middle) else middle


@dataclass(frozen=True)
class CompareResult:
    """What a comparison found. `table` prints; `best` is the recommended arm, ready in `best_folder`."""

    folder: Path
    design: Comparison
    analysis: Analysis
    rows: tuple[dict[str, Any], ...]
    sentence: str
    test_reads: int
    best_folder: Path | None

    @property
    def best(self) -> str:
        return self.analysis.recommended

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def table(self) -> str:
        return table_text(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The content of summary.json."""
        return json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))

    def __str__(self) -> str:
        return f"{self.sentence}\n\n{self.table}\n\nreport: {self.report}"


def publish(
    folder: Path,
    design: Comparison,
    expected: Forecast | None,
    records: Sequence[Record],
    reads: int,
    source: str,
    scores_rise: bool = True,
    show: Callable[[Sequence[str]], Mapping[str, dict[str, Any]]] | None = None,
    scores: Scores | None = None,
    notes: Sequence[str] = (),
) -> CompareResult:
    """Analyse the records and write scores.jsonl, results.jsonl, history.jsonl, summary.json, best/, items.jsonl
    and report.html. show: the texts or pictures of test items (see `items.described`).

    scores_rise: item scores are better where they are higher, as a trainer's always are, whatever its metric.
    scores: where they are not item scores. notes: what a reader must know of the source.
    """
    from veneer.comparing.reporting.words import conclusion
    from veneer.tasks import find_metric

    of_items = scores_of(records) if scores is None else scores
    corpus = None if isinstance(of_items, RunScores) else of_records(design.metric, records, of_items)
    scores = of_items if corpus is None else corpus
    rise = scores_rise if corpus is None else find_metric(design.metric).greater_is_better
    sign = 1.0 if rise else -1.0
    oriented = scores if rise else scores.turned()
    costs = {str(record.arm): record.costs for record in records}
    # A control is never recommended: it has no price.
    prices = {str(r.arm): r.costs for r in records if r.arm.method not in OPTIONAL_CONTROLS}
    analysis = analyse(oriented, prices, design.contrasts, design.correction)
    rows = tuple(row for record in records for row in _rows(record, design, scores))
    shown = scores.of.values() if corpus is None else [of.mean(1) for of in scores.of.values()]
    scale = Scale.of(_analysed(design, rows), sign, shown)
    sentence = conclusion(analysis, scale, costs, design.is_demo)
    summary = _summary(design, analysis, scale, records, rows, costs, sentence, reads, source)
    made_here = source == "veneer"  # names from elsewhere are no arms
    summary["controls"] = judged(oriented, [arm.arm for arm in analysis.arms]) if made_here else []
    summary |= {"notes": [*notes, *(PARTS_NOTE if corpus is not None else ())]}
    risen = of_items if scores_rise else of_items.turned()
    anew = None if corpus is None else Anew(design.metric)
    summary |= sections(design, records, oriented, risen, scores_of, scores_rise, anew)
    if expected is not None:  # without the time, which depends on what has ended
        summary["forecast"] = str(forecast(design, design.sizes))
    write_atomic(folder / "trials.jsonl", "".join(_line(trial) for trial in trials_of(records)))
    if "rule" in design.claim:
        summary["claims"] = [decide(Cell(folder, summary, oriented)).to_dict()]
    write_atomic(folder / "results.jsonl", "".join(_line(row) for row in rows))
    write_atomic(
        folder / "scores.jsonl", "".join(_line(line) for line in _score_lines(records, of_items, corpus))
    )
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    best_folder = _publish_best(folder, records, analysis, summary) if source == "veneer" else None
    result = CompareResult(folder, design, analysis, rows, sentence, reads, best_folder)
    histories = [line for record in records for line in _history_lines(record)]
    write_atomic(folder / "history.jsonl", "".join(_line(line) for line in histories))
    if isinstance(scores, RunScores):  # there are no items to show
        write_report(folder)
        return result
    disputed = most_disputed(np.stack([of.mean(0) for of in of_items.of.values()]))
    opened = (one for record in records for one in record.opened)
    write_items(folder, [of_items.items[place] for place in disputed], opened, show)
    write_report(folder)
    return result


def _analysed(design: Comparison, rows: Sequence[Mapping[str, Any]]) -> str:
    """What the intervals are of: the metric where it is the mean of the item scores, else their mean."""
    known = [row for row in rows if row["value"] is not None]
    is_mean = all(abs(row["value"] - row["item_score"]) < 1e-6 for row in known)
    return design.metric if is_mean else "mean item score"


def scores_of(records: Sequence[Record]) -> Scores:
    """Item scores of all arms over the same items. A run that diverged scores as the untrained base does."""
    measured = [record for record in records if record.status == "ok" and record.lines]
    first = next((opened for record in measured for opened in record.opened if opened), None)
    if first is None:
        raise BadData("no run has scores on the test split.", next_step="see 'reason' in ledger.jsonl")
    items = tuple(sorted(item["item"] for item in first["items"]))  # in an order that no file decides
    if len(items) < 2 or len(set(items)) != len(items):
        raise BadData(
            f"the test split has {len(items)} items with {len(set(items))} different ids: "
            "expected at least 2, each id once.",
            next_step="give every item an id of its own",
        )
    chance = _chance(measured, items)
    of, seeds = {}, {}
    for record in measured:
        rows = [
            chance if opened is None else _in_order(opened, items, record.arm) for opened in record.opened
        ]
        if any(row is None for row in rows):
            record.status = "failed"
            record.reason = "it diverged, and the untrained base, whose score it would get, was not measured"
            continue
        of[str(record.arm)] = np.array(rows, dtype=np.float64)
        seeds[str(record.arm)] = tuple(line["seed"] for line in record.lines)
    return Scores(of, seeds, items)


def _chance(measured: Sequence[Record], items: tuple[str, ...]) -> list[float] | None:
    for record in measured:
        if not record.arm.is_trained and record.opened and record.opened[0]:
            return _in_order(record.opened[0], items, record.arm)
    return None


def _in_order(opened: Mapping[str, Any], items: tuple[str, ...], arm: Arm) -> list[float]:
    found = {item["item"]: item["score"] for item in opened["items"]}
    missing, further = [i for i in items if i not in found], set(found) - set(items)
    if missing or further or len(found) != len(opened["items"]):
        raise BadData(
            f"'{arm}' was scored on other test items than the first arm: {len(missing)} missing "
            f"({', '.join(missing[:3])}), {len(further)} more ({', '.join(sorted(further)[:3])}), "
            f"{len(opened['items']) - len(found)} twice.",
            next_step="score every arm and seed on the same items: the comparison is paired",
        )
    return [found[item] for item in items]


def _rows(record: Record, design: Comparison, scores: Scores) -> list[dict[str, Any]]:
    """The lines of results.jsonl for one arm: one a seed, or one with the reason why there is none."""
    name = str(record.arm)
    common = {"arm": name, "method": record.arm.method, "metric": design.metric, "design": design.sha256}
    blank = dict.fromkeys(COSTS)
    if name not in scores.of:
        settings = settings_of(record, design, None)
        return [
            {**common, "seed": None, "status": record.status, "reason": record.reason, "value": None, **blank}
            | {"learning_rate": record.learning_rate, "settings": settings}
        ]
    rows = []
    for line, opened, of in zip(record.lines, record.opened, scores.of[name], strict=True):
        value = (opened or {}).get("metrics", {}).get(design.metric)
        rows.append(
            {
                **common,
                "seed": line["seed"],
                "status": line["status"],
                "reason": line["reason"],
                "value": float(of.mean()) if value is None else value,
                "item_score": float(of.mean()),
                "validation": line.get("validation"),
                **{key: line.get(key) for key in COSTS},
                "learning_rate": record.learning_rate,
                "settings": settings_of(record, design, line["seed"]),
            }
        )
    return rows


def settings_of(record: Record, design: Comparison, seed: Any) -> dict[str, Any]:
    """All that is needed to repeat one run, with the command that does it."""
    arm = record.arm
    settings: dict[str, Any] = {
        "model": design.model,
        "data": design.data,
        "task": design.task,
        "method": arm.method,
        "options": dict(arm.options),
        "recipes": [str(recipe) for recipe in arm.recipes],
        "learning_rate": record.learning_rate,
        "seed": seed,
        "budget": design.budget,
        **design.options,
    }
    if seed is not None and arm.is_trained and arm.anchor == arm and design.model:
        settings["command"] = command_of(record, design, seed)
    return json.loads(json.dumps(settings, default=str))


def command_of(record: Record, design: Comparison, seed: Any) -> str:
    """`veneer train ...` with the settings of one run."""
    import shlex

    parts = ["veneer", "train", "--model", design.model, "--data", design.data, "--method", str(record.arm)]
    if design.task:
        parts += ["--task", design.task]
    if record.learning_rate is not None:
        parts += ["--learning-rate", f"{record.learning_rate:g}"]
    for key, value in design.reading.items():
        pairs = value.items() if isinstance(value, Mapping) else ()
        parts += ["--" + key, ",".join(f"{k}={v}" for k, v in pairs) or str(value)]
    for key, value in design.options.items():
        parts += ["--" + key.replace("_", "-"), str(value)]
    parts += ["--seed", str(seed), "--output", f"runs/{record.arm.slug}"]
    return " ".join(shlex.quote(part) for part in parts)


def _score_lines(
    records: Sequence[Record], scores: Scores, corpus: Scores | None = None
) -> list[dict[str, Any]]:
    """Lines that `from_results` reads: arm, seed, item, score; costs stand on the first line of a run.

    With a metric that is no mean of item scores, `part` is the item's part in it, or its query's.
    """
    lines = []
    place_of = {} if corpus is None else {item: place for place, item in enumerate(corpus.items)}
    for record in records:
        name = str(record.arm)
        if name not in scores.of:
            continue
        for row, (line, opened, of) in enumerate(
            zip(record.lines, record.opened, scores.of[name], strict=True)
        ):
            more = {item["item"]: item for item in (opened or {"items": []})["items"]}
            for place, (item, score) in enumerate(zip(scores.items, of, strict=True)):
                costs = {key: line.get(key) for key in COSTS if place == 0 and line.get(key) is not None}
                known = more.get(item, {})
                extra = {k: v for k, v in known.items() if k in KEPT}
                run = {"arm": name, "seed": line["seed"]}
                run |= {} if isinstance(scores, RunScores) else {"item": item}
                part_of = place_of.get(item, place_of.get(str(known.get("query"))))
                if corpus is not None and part_of is not None:
                    extra["part"] = float(corpus.of[name][row, part_of])
                lines.append({**run, "score": float(score), **extra, **costs})
    return lines


def _history_lines(record: Record) -> list[dict[str, Any]]:
    """Lines of history.jsonl: the losses of each confirmed run (see `history.compact`)."""
    return [
        {"arm": str(record.arm), "seed": line["seed"], **line["history"]}
        for line in record.lines
        if line.get("history")
    ]


def _summary(
    design: Comparison,
    analysis: Analysis,
    scale: Scale,
    records: Sequence[Record],
    rows: Sequence[Mapping[str, Any]],
    costs: Mapping[str, Mapping[str, Any]],
    sentence: str,
    reads: int,
    source: str,
) -> dict[str, Any]:
    arms = []
    values = {
        arm: _mean([row["value"] for row in rows if row["arm"] == arm and row["value"] is not None])
        for arm in costs
    }
    for result in analysis.arms:
        low, high = scale.bounds(result.interval.low, result.interval.high)
        if scale.is_share:
            low, high = max(0.0, low), min(1.0, high)
        arms.append(
            {
                "arm": result.arm,
                "mean": scale.sign * result.interval.estimate,
                "low": low,
                "high": high,
                "metric_mean": values[result.arm],
                "tied_with_best": result.tied_with_best,
                "p_adjusted": result.p_adjusted,
                "on_front": result.front_probability >= 0.5,
                "front_probability": result.front_probability,
                "seed_deviation": _finite(result.seed_deviation),
                "groups": list(result.group),
                **costs[result.arm],
            }
        )
    best_run = next(record.best for record in records if str(record.arm) == analysis.recommended)
    return {
        "design": design.sha256,
        "budget": parse_budget(design.budget).label,
        "claim": DEMO if design.is_demo else "",
        "metric": design.metric,
        "analysed": scale.metric,
        "higher_is_better": scale.sign > 0,
        "in_percent": scale.is_share,
        "seeds": analysis.seeds,
        "items": analysis.items,
        "items_only": any(result.interval.items_only for result in analysis.arms),
        "arms": arms,
        "not_measured": [
            {"arm": str(record.arm), "status": record.status, "reason": record.reason}
            for record in records
            if str(record.arm) not in {arm["arm"] for arm in arms}
        ],
        "recommendation": {
            "arm": analysis.recommended,
            "seed": None if best_run is None else best_run["seed"],
            "best_mean": analysis.best,
            "sentence": sentence,
            "rule": "fewest trained parameters, then shortest step, among the arms not separable "
            "from the best; its seed with the highest validation score",
        },
        "diverged": {
            str(record.arm): sum(line["status"] == "diverged" for line in record.lines) for record in records
        },
        "contrasts": [
            {
                "first": contrast.first,
                "second": contrast.second,
                "difference": scale.sign * contrast.difference.estimate,
                "low": scale.bounds(contrast.difference.low, contrast.difference.high)[0],
                "high": scale.bounds(contrast.difference.low, contrast.difference.high)[1],
                "p": contrast.difference.p_value,
                "p_adjusted": contrast.p_adjusted,
                "separable": contrast.separable,
                "sign_flip_p": contrast.difference.sign_flip_p,
                "sign_flip_can_decide": analysis.sign_flip_decides,
            }
            for contrast in analysis.contrasts
        ],
        "contrasts_planned": analysis.contrasts_are_planned,
        "correction": analysis.correction,
        "best_group": {
            "arms": [result.arm for result in analysis.arms if result.tied_with_best],
            "confidence": 0.95,
            "rule": "comparisons with the best (Hsu, 1981): every arm against every other, one-sided, Bonferroni",
        },
        "groups": [list(group) for group in analysis.groups],
        "smallest_effect_found": analysis.smallest_found,
        "smallest_effect_of_interest": design.smallest_effect,
        # Without their seconds: the summary of a resumed comparison is that of one that was never stopped.
        "trials": [{k: v for k, v in trial.items() if k != "seconds"} for trial in trials_of(records)],
        "test_reads": reads,
        "source": source,
        "comparison": json.loads(json.dumps(design.to_dict(), default=str)),
    }


def trials_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every run on which a rate was tried: a line of trials.jsonl each, in the order in which they ran."""
    return [
        {
            "arm": str(record.arm),
            "learning_rate": trial["learning_rate"],
            "seed": trial["seed"],
            "validation": trial.get("validation"),
            "status": trial["status"],
            "seconds": trial.get("seconds"),
            **({"share": trial["share"]} if "share" in trial else {}),
            "chosen": trial["learning_rate"] == record.learning_rate,
        }
        for record in records
        for trial in record.trials
    ]


def _publish_best(
    folder: Path, records: Sequence[Record], analysis: Analysis, summary: Mapping[str, Any]
) -> Path:
    """`best/`: the winner's folder, replaced as a whole; its comparison.json says where it comes from."""
    record = next(record for record in records if str(record.arm) == analysis.recommended)
    source = None
    if record.best is not None and record.best.get("folder"):
        source = folder / record.best["folder"]
    best, fresh = folder / "best", folder / ".best.new"
    shutil.rmtree(fresh, ignore_errors=True)
    if source is not None and source.is_dir():
        shutil.copytree(source, fresh, ignore=shutil.ignore_patterns(".lock", "run.json", "checkpoint*"))
    else:
        fresh.mkdir(parents=True)
    note = {"design": summary["design"], "claim": summary["claim"], **summary["recommendation"]}
    write_atomic(fresh / "comparison.json", json.dumps(note, indent=2) + "\n")
    shutil.rmtree(best, ignore_errors=True)
    fresh.rename(best)
    return best


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
