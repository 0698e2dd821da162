"""A finished comparison, read from its folder: what claims and summaries over several comparisons stand on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from veneer.comparing.inference.scores import RunScores, Scores
from veneer.errors import BadFile


@dataclass(frozen=True)
class Cell:
    """One comparison: one data set and one base. scores: turned so that higher is better."""

    folder: Path
    summary: Mapping[str, Any]
    scores: Scores

    @property
    def data(self) -> str:
        return str(self.summary["comparison"]["data"])

    @property
    def model(self) -> str:
        return str(self.summary["comparison"]["model"])

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def smallest_effect(self) -> float:
        return float(self.summary["smallest_effect_of_interest"])

    def parameters(self, arm: str) -> float | None:
        """How many parameters the arm trains, where that is known."""
        found = [one["trainable_parameters"] for one in self.summary["arms"] if one["arm"] == arm]
        return found[0] if found else None

    def trials(self) -> Iterator[dict[str, Any]]:
        """Every run on which a learning rate was tried: arm, learning_rate, seed, status, validation."""
        path = self.folder / "trials.jsonl"
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                yield json.loads(line)


def read_cell(folder: str | Path) -> Cell:
    """The comparison in `folder`. Errors: BadFile where it is not finished."""
    folder = Path(folder)
    texts = []
    for name in ("summary.json", "scores.jsonl"):
        try:
            texts.append((folder / name).read_text(encoding="utf-8"))
        except OSError:
            raise BadFile(
                f"{folder} holds no finished comparison: {name} is not there.",
                next_step="veneer compare ... --output FOLDER, to its end",
            ) from None
    try:
        summary = json.loads(texts[0])
        scores = _scores(map(json.loads, texts[1].splitlines()), summary["items"] or None)
    except (ValueError, KeyError) as error:
        raise BadFile(
            f"{folder} holds a comparison that cannot be read: {type(error).__name__}: {error}.",
            next_step="the same veneer compare command writes its results anew",
        ) from error
    return Cell(folder, summary, scores if summary["higher_is_better"] else scores.turned())


def _scores(lines: Iterator[Mapping[str, Any]], items: int | None) -> Scores:
    """`part` is what an item adds to a metric that is no mean of item scores; there it goes before the score."""
    runs: dict[str, dict[Any, dict[str, float]]] = {}
    for line in lines:
        run = runs.setdefault(line["arm"], {}).setdefault(line["seed"], {})
        of_query = "part" in line and "query" in line
        run[str(line["query"] if of_query else line.get("item", ""))] = float(line.get("part", line["score"]))
    names = tuple(sorted(next(iter(next(iter(runs.values())).values()))))
    of = {
        arm: np.array([[run[i] for i in names] for run in by_seed.values()]) for arm, by_seed in runs.items()
    }
    seeds = {arm: tuple(by_seed) for arm, by_seed in runs.items()}
    return RunScores(of, seeds, ("run",), items) if names == ("",) else Scores(of, seeds, names)
