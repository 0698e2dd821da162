"""Histories of training: what a run keeps of its losses, means over runs, and when a target was reached."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

KEPT = 60  # points of a curve: more than a chart 480 units wide can show apart


def compact(history: Sequence[Mapping[str, Any]], metric: str, most: int = KEPT) -> dict[str, Any] | None:
    """The history of a training in at most `most` points of loss, each the mean of the steps since the last.

    {"steps": [...], "loss": [...], "validation": [[step, metric], ...]}; None where there is no loss.
    """
    losses = [(entry["step"], float(entry["loss"])) for entry in history if entry.get("loss") is not None]
    if not losses:
        return None
    count = min(most, len(losses))
    edges = [round(place * len(losses) / count) for place in range(count + 1)]
    bins = [losses[first:last] for first, last in pairwise(edges)]
    looked = [
        [entry["step"], round(float(entry[metric]), 6)]
        for entry in history
        if entry.get("split") == "validation" and entry.get(metric) is not None
    ]
    return {
        "steps": [part[-1][0] for part in bins],
        "loss": [round(statistics.fmean(loss for _, loss in part), 5) for part in bins],
        "validation": looked,
    }


def mean_curve(histories: Sequence[Mapping[str, Any]], smooth: int = 5) -> list[tuple[int, float]]:
    """[(step, loss)], the mean over runs with the same steps, each point the mean of `smooth` up to it."""
    lengths = [tuple(history["steps"]) for history in histories]
    steps = max(lengths, key=lengths.count)
    same = [history["loss"] for history in histories if tuple(history["steps"]) == steps]
    means = [statistics.fmean(column) for column in zip(*same)]
    return [
        (step, statistics.fmean(means[max(0, place - smooth + 1) : place + 1]))
        for place, step in enumerate(steps)
    ]


def validation_curve(histories: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """[(step, metric)], the mean over runs of what was measured on validation rows while training."""
    at: dict[int, list[float]] = {}
    for history in histories:
        for step, value in history.get("validation", ()):
            at.setdefault(step, []).append(value)
    return [(step, statistics.fmean(values)) for step, values in sorted(at.items())]


def first_reached(curve: Sequence[tuple[int, float]], target: float, falls: bool) -> int | None:
    """The first step at which a curve is as good as `target`; falls: lower is better."""
    for step, value in curve:
        if value <= target if falls else value >= target:
            return step
    return None


def common_target(
    curves: Mapping[str, Sequence[tuple[int, float]]], arms: Sequence[str], falls: bool
) -> float | None:
    """What the slowest of `arms` reaches at its best: the highest target that all of them reach."""
    bests = [(min if falls else max)(value for _, value in curves[arm]) for arm in arms if curves.get(arm)]
    return ((max if falls else min)(bests)) if bests else None
