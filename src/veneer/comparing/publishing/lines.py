"""The lines of results.jsonl, scores.jsonl and history.jsonl, with all that repeats a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.comparing.inference.analysis import Scores
from veneer.comparing.inference.scores import RunScores
from veneer.comparing.planning.design import Comparison
from veneer.comparing.publishing.records import Record
from veneer.comparing.running.runs import COSTS

KEPT = ("prediction", "label", "query", "group", "confidence")
"""What scores.jsonl keeps of an item beside its score."""


def rows_of(record: Record, design: Comparison, scores: Scores) -> list[dict[str, Any]]:
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


def score_lines(
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


def history_lines(record: Record) -> list[dict[str, Any]]:
    """Lines of history.jsonl: the losses of each confirmed run (see `history.compact`)."""
    return [
        {"arm": str(record.arm), "seed": line["seed"], **line["history"]}
        for line in record.lines
        if line.get("history")
    ]


def line_of(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
