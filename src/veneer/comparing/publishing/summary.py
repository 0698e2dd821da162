"""The summary of a comparison: what summary.json says of arms, contrasts, groups and the recommendation."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from veneer.comparing.inference.analysis import Analysis
from veneer.comparing.planning.budget import DEMO, parse_budget
from veneer.comparing.planning.design import Comparison
from veneer.comparing.publishing.records import Record
from veneer.comparing.reporting.words import Scale


def analysed(design: Comparison, rows: Sequence[Mapping[str, Any]]) -> str:
    """What the intervals are of: the metric where it is the mean of the item scores, else their mean."""
    known = [row for row in rows if row["value"] is not None]
    is_mean = all(abs(row["value"] - row["item_score"]) < 1e-6 for row in known)
    return design.metric if is_mean else "mean item score"


def summary_of(
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


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
