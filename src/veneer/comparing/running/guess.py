"""The untrained base where labels are predicted: the best guess that is the same for every row."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

GUESSED = ("classify", "image-classify", "regress")  # tasks whose untrained base has a head of random numbers


def constant_guess(runner: Any, splits: tuple[str, ...], output: Path) -> Any:
    """The majority class of the training rows, their shares as probabilities; for numbers the mean."""
    labels = [_label(runner.task, row) for row in runner.data.train]
    predictions = {
        split: [
            {"item": number, **_guess(runner.task, labels, _label(runner.task, row))}
            for number, row in enumerate(rows)
        ]
        for split, rows in runner.beyond.beside(runner.data, splits).splits.items()
        if split in splits
    }
    return SimpleNamespace(
        metrics={split: runner.task.metrics(found) for split, found in predictions.items()},
        predictions=predictions,
        trainable_parameters=0,
        bytes_on_disk=0,
        step_seconds=None,
        tokens_per_second=None,
        peak_memory_bytes=None,
        folder=output,
    )


def _label(task: Any, row: Mapping[str, Any]) -> Any:
    """The number to predict, or the index of the class."""
    return float(row["label"]) if task.name == "regress" else task.index_of(row["label"])


def _guess(task: Any, labels: list[Any], label: Any) -> dict[str, Any]:
    if task.name == "regress":
        mean = statistics.fmean(labels)
        return {"score": -((mean - label) ** 2), "prediction": mean, "label": label}
    names = list(task.labels)
    counts = Counter(labels)
    best = max(range(len(names)), key=lambda index: counts[index])
    return {
        "score": float(best == label),
        "prediction": names[best],
        "label": names[label],
        "probabilities": {name: counts[index] / len(labels) for index, name in enumerate(names)},
    }
