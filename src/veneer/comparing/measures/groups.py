"""Scores by group of items: the worst group, and the gap between the best and the worst, with honest intervals.

Which group is worst is read off the same scores, so that its own interval would be too hopeful. The bounds here hold
for all groups (and all pairs) at once, by Bonferroni: with theta_g in [L_g, U_g] for every g, the smallest theta lies
in [min L, min U], and the largest difference in [max L, max U] over pairs. Groups share their seeds and no items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from veneer.comparing.inference.statistics import (
    CONFIDENCE,
    Array,
    Spread,
    crossed_interval,
    is_binary,
    spread,
)

SMALL = 30
"""Items below which a group is marked small, and left out of the worst group and the gap."""


def spread_apart(first: Array, second: Array) -> Spread:
    """Spread of `mean(first) - mean(second)` over other items, (seed, item) and (seed, item'), run by run.

    The seeds are the same; the item variances add, with the degrees of freedom of Satterthwaite.
    """
    one, two = spread(first), spread(second)
    from_items = one.from_items + two.from_items
    noise = one.from_items**2 / one.item_df + two.from_items**2 / two.item_df
    item_df = from_items**2 / noise if noise > 0 else min(one.item_df, two.item_df)
    estimate = one.estimate - two.estimate
    seeds = first.shape[0]
    if seeds == 1:
        return Spread(estimate, 0.0, from_items, 0.0, 1.0, item_df)
    from_seeds = (first.mean(1) - second.mean(1)).var(ddof=1) / seeds
    from_seeds = 0.0 if from_seeds < 1e-24 else from_seeds
    return Spread(estimate, from_seeds, from_items, one.shared + two.shared, seeds - 1.0, item_df)


def difference_apart(first: Array, second: Array, confidence: float = CONFIDENCE) -> dict[str, float]:
    """{"difference", "low", "high"} of means over other items, with the same seeds."""
    found = spread_apart(first, second)
    half = float(found.half_width((1 - confidence) / 2))
    estimate = float(found.estimate)
    low, high = estimate - half, estimate + half
    if is_binary(first) and is_binary(second):
        low, high = max(-1.0, low), min(1.0, high)
    return {"difference": estimate, "low": low, "high": high}


def by_group(scores: Array, groups: Sequence[str], confidence: float = CONFIDENCE) -> dict[str, Any]:
    """One arm's scores (seed, item), higher is better, by the group of each item.

    -> {"groups": [{"group", "n", "small", "mean", "low", "high"}], "worst": {...}, "gap": {...}}; worst and gap are
    None where fewer than two groups are large enough.
    """
    of = {
        name: scores[:, np.array([g == name for g in groups])] for name in sorted(set(groups), key=_in_order)
    }
    rows = [_row(name, part, confidence) for name, part in of.items()]
    large = {name: part for name, part in of.items() if part.shape[1] >= SMALL}
    if len(large) < 2:
        return {"groups": rows, "worst": None, "gap": None}
    return {"groups": rows, "worst": _worst(large, confidence), "gap": _gap(large, confidence)}


def turned_back(found: Mapping[str, Any]) -> dict[str, Any]:
    """`by_group` of scores that were turned, in their own direction: lower is better; a gap is a gap either way."""

    def turn(row: Mapping[str, Any]) -> dict[str, Any]:
        ends = {"low": row["high"], "high": row["low"]}
        return {
            **row,
            "mean": -row["mean"],
            **{key: None if end is None else -end for key, end in ends.items()},
        }

    worst = found["worst"]
    return {**found, "groups": [turn(row) for row in found["groups"]], "worst": worst and turn(worst)}


def _in_order(name: str) -> tuple[int, float, str]:
    """Spans of numbers by size, before names by the alphabet."""
    try:
        return 0, float(name.partition(" to ")[0]), name
    except ValueError:
        return 1, 0.0, name


def _row(name: str, part: Array, confidence: float) -> dict[str, Any]:
    count = part.shape[1]
    row: dict[str, Any] = {"group": name, "n": count, "small": count < SMALL, "mean": float(part.mean())}
    if count < 2:
        return row | {"low": None, "high": None}
    found = crossed_interval(part, confidence)
    return row | {"low": found.low, "high": found.high}


def _worst(of: Mapping[str, Array], confidence: float) -> dict[str, Any]:
    each = 1 - (1 - confidence) / len(of)
    found = {name: crossed_interval(part, each) for name, part in of.items()}
    name = min(found, key=lambda one: (found[one].estimate, one))
    return {
        "group": name,
        "mean": found[name].estimate,
        "low": min(one.low for one in found.values()),
        "high": min(one.high for one in found.values()),
    }


def _gap(of: Mapping[str, Array], confidence: float) -> dict[str, Any]:
    """The largest difference of two groups; no less than 0."""
    pairs = [(a, b) for a in of for b in of if a < b]
    each = 1 - (1 - confidence) / len(pairs)
    lows, highs = [], []
    for first, second in pairs:
        found = difference_apart(of[first], of[second], each)
        lows.append(max(found["low"], -found["high"]))  # of the distance, whichever of the two is better
        highs.append(max(found["high"], -found["low"]))
    means = {name: float(part.mean()) for name, part in of.items()}
    best, worst = max(means, key=lambda n: (means[n], n)), min(means, key=lambda n: (means[n], n))
    return {
        "best": best,
        "worst": worst,
        "difference": means[best] - means[worst],
        "low": max(0.0, *lows),
        "high": max(highs),
    }
