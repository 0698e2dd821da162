"""Quality against each cost: with what probability is an arm on the front?

An arm is on the front where no other is at least as good for less, or better for as little. Both sides are
uncertain: quality is drawn anew over seeds and items as everywhere, and a cost that was timed is drawn anew
over its turns. The turns alternated, so that one draw of turns serves all arms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from veneer.comparing.inference.analysis import Scores, drawn_means, on_front
from veneer.comparing.inference.statistics import Array
from veneer.comparing.measures.hypervolume import hypervolume

RESAMPLES = 2000
COSTS = {
    "trainable_parameters": "trained parameters",
    "bytes_on_disk": "bytes on disk",
    "peak_memory_bytes": "memory of training above the loaded model",
    "step_seconds": "seconds of a training step",
    "cpu_seconds": "processor seconds of a training step",
    "flops_per_step": "floating-point operations of a training step",
    "tuning_seconds": "seconds of all learning-rate trials",
    "latency_seconds": "seconds for one item, the adapter attached",
    "latency_cpu_seconds": "processor seconds for one item, the adapter attached",
    "merged_latency_seconds": "seconds for one item, merged where the method merges",
}
"""What is paid, for all of which less is better; each gets a front of its own."""


def fronts(
    scores: Scores, costs: Mapping[str, Mapping[str, Any]], resamples: int = RESAMPLES
) -> dict[str, dict[str, Any]]:
    """{cost: {"about", "probability": {arm: share of resamples on the front}, "hypervolume"}}, for known costs.

    hypervolume: see `hypervolume`, against the untrained base, or the worst arm where that was not measured.
    scores: higher is better. An arm whose cost is not known is left out.
    """
    names = sorted(name for name in scores.of if name in costs)
    quality = drawn_means(scores, names, resamples)
    means = np.array([float(np.nanmean(scores.of[name])) for name in names])
    worst = means[names.index("untrained")] if "untrained" in names else means.min(initial=np.inf)
    found: dict[str, dict[str, Any]] = {}
    for cost, about in COSTS.items():
        known = [name for name in names if costs.get(name, {}).get(cost) is not None]
        if len(known) < 2:
            continue
        places = [names.index(name) for name in known]
        drawn = _prices(known, costs, cost, resamples)
        found[cost] = {"about": about, "probability": on_front(known, quality[places], drawn)}
        price = np.array([float(costs[name][cost]) for name in known])
        area = hypervolume(known, means[places], quality[places], price, drawn, float(worst))
        if area is not None:
            found[cost]["hypervolume"] = area
    return found


def _prices(names: Sequence[str], costs: Mapping[str, Mapping[str, Any]], cost: str, resamples: int) -> Array:
    """(arm, resample): the median of the turns drawn anew where there are turns, else the number itself."""
    prices = np.array([[float(costs[name][cost])] for name in names])
    turns = [costs[name].get("turns_of", {}).get(cost) for name in names]
    counts = {len(turn) for turn in turns if turn}
    if len(counts) != 1 or next(iter(counts)) < 2:
        return prices
    count = next(iter(counts))
    rng = np.random.default_rng(1)
    drawn = rng.integers(count, size=(resamples, count))
    prices = np.repeat(prices, resamples, axis=1)
    for place, turn in enumerate(turns):
        if turn:
            prices[place] = np.median(np.array(turn, dtype=np.float64)[drawn], axis=1)
    return prices
