"""Scores on further sets beside those on the test split: shifted, corrupted, and what was forgotten.

A shifted set has other items, and shares the seeds; a corrupted one has the same items, so that its drop is paired
item by item; what was forgotten is the difference to the bare base on the same off-task items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from veneer.comparing.inference.analysis import Scores
from veneer.comparing.inference.statistics import Array, crossed_interval, difference
from veneer.comparing.measures.calibration import over_seeds
from veneer.comparing.measures.groups import difference_apart

BARE = "untrained"


def score_of(scores: Array) -> dict[str, float]:
    found = crossed_interval(scores)
    return {"mean": found.estimate, "low": found.low, "high": found.high}


def shifted(inside: Scores, outside: Scores) -> dict[str, dict[str, Any]]:
    """{arm: score on the shifted set, and `drop` from the test split}; other items, the same seeds."""
    return {
        arm: score_of(of) | {"drop": difference_apart(inside.of[arm], of)}
        for arm, of in outside.of.items()
        if arm in inside.of
    }


def corrupted(clean: Scores, spoiled: Scores) -> dict[str, dict[str, Any]]:
    """{arm: score under the corruption, and `drop` from the same items as they were}."""
    place = {item: number for number, item in enumerate(clean.items)}
    columns = np.array([place[item] for item in spoiled.items])
    return {
        arm: score_of(of) | {"drop": paired(clean.of[arm][:, columns], of)}
        for arm, of in spoiled.of.items()
        if arm in clean.of
    }


def paired(first: Array, second: Array) -> dict[str, float]:
    """{"difference", "low", "high"} of `mean(first) - mean(second)` over the same items and seeds."""
    found = difference(first, second, flips=False)
    return {"difference": found.estimate, "low": found.low, "high": found.high}


def mean_of_sets(sets: Sequence[Scores]) -> Scores | None:
    """Each item's mean score over sets of the same items; None where they differ."""
    if not sets or any(one.items != sets[0].items for one in sets):
        return None
    arms = [arm for arm in sets[0].of if all(arm in one.of for one in sets)]
    return Scores(
        {arm: np.mean([one.of[arm] for one in sets], axis=0) for arm in arms}, sets[0].seeds, sets[0].items
    )


def forgotten(scores: Scores, opened: Mapping[str, Sequence[Any]], measure: str) -> dict[str, dict[str, Any]]:
    """{arm: score on the off-task set, and `lost` against the bare base}; with perplexities where it is of texts.

    opened: {arm: the sealed set of each seed, or None}.
    """
    if BARE not in scores.of:
        return {}
    bare = scores.of[BARE]
    found: dict[str, dict[str, Any]] = {}
    for arm, of in scores.of.items():
        found[arm] = score_of(of) | {
            "lost": None if arm == BARE else paired(np.repeat(bare[:1], len(of), axis=0), of)
        }
        if measure == "perplexity":
            found[arm]["perplexity"] = over_seeds([perplexity(one["items"]) for one in opened[arm] if one])
    return found


def perplexity(items: Sequence[Mapping[str, Any]]) -> float:
    """From the summed loss (`prediction`) and the number of tokens (`label`) of each text."""
    return float(np.exp(sum(one["prediction"] for one in items) / max(1, sum(one["label"] for one in items))))
