"""A compare folder as its report reads it: the files alone, so that a report can be made again at any time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.comparing.reporting.items import FILE
from veneer.comparing.reporting.words import Scale


@dataclass(frozen=True)
class Published:
    """summary: summary.json. rows: results.jsonl. trials: every run that chose a rate. histories: {arm: [losses
    of a run, with "seed"]}. items: {item: {"text", "image"}}."""

    folder: Path
    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    trials: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    histories: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    items: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> Published:
        """Of a folder that `compare` or `compare --from` published."""
        folder = Path(folder)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        names = [arm["arm"] for arm in summary["arms"]]
        return cls(
            folder=folder,
            summary=summary,
            rows=lines_of(folder / "results.jsonl"),
            trials=_by_arm(_trials(folder), names),
            histories=_by_arm(lines_of(folder / "history.jsonl"), names),
            items={line["item"]: line for line in lines_of(folder / FILE)},
        )

    @property
    def arms(self) -> Sequence[Mapping[str, Any]]:
        return self.summary["arms"]

    @property
    def chosen(self) -> str:
        return self.summary["recommendation"]["arm"]

    @property
    def made_here(self) -> bool:
        return self.summary["source"] == "veneer"

    @property
    def scale(self) -> Scale:
        """Of the scores that are analysed."""
        s = self.summary
        return Scale(s["analysed"], 1.0 if s["higher_is_better"] else -1.0, s["in_percent"])

    @property
    def metric_rises(self) -> bool:
        """Whether a higher value of the metric, as trials have it, is better."""
        return bool(self.summary["comparison"].get("higher_is_better", True))

    @property
    def metric_in_percent(self) -> bool:
        return self.summary["in_percent"] and self.summary["analysed"] == self.summary["metric"]

    def rate_of(self, arm: str) -> float | None:
        return next((row["learning_rate"] for row in self.rows if row["arm"] == arm), None)

    def tuning_seconds(self, arm: str) -> float | None:
        known = [trial.get("seconds") or 0.0 for trial in self.trials.get(arm, ())]
        return sum(known) if known else None


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a torn last line is left out, a file that is not there is empty."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            found += [json.loads(text)] if text else []
        except ValueError:
            break
    return found


def _trials(folder: Path) -> list[dict[str, Any]]:
    """trials.jsonl, or where there is none the runs of the ledger that chose a rate."""
    if (folder / "trials.jsonl").is_file():
        return [{"learning_rate": line.get("rate"), **line} for line in lines_of(folder / "trials.jsonl")]
    runs = [line for line in lines_of(folder / "ledger.jsonl") if line.get("kind") == "run"]
    return [line for line in runs if line["stage"] == "tune" and line["status"] != "failed"]


def _by_arm(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name in names:
        mine = [line for line in lines if line["arm"] == name]
        if mine:
            found[name] = mine
    return found
