"""The hypervolume of a front: one number for how much quality a whole set of arms buys, over all budgets.

In two dimensions it is the area between the front and a reference point (Zitzler & Thiele, 1999): here the quality of
the untrained base, and a tenth of the prices' range beyond the dearest arm. Prices are logarithmic and their range is
one, so that the area reads as a mean: over budgets, the gain of the best arm that the budget allows. What an arm adds
is the area that the front loses without it.

Quality and timed prices are drawn anew as for the front's probabilities; the reference point stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from veneer.comparing.inference.statistics import Array

BEYOND = 0.1  # of the logarithmic range of prices, so that the dearest arm has a width too
LEAST = 1e-12  # area: below it an arm adds nothing but rounding


def hypervolume(
    names: Sequence[str], means: Array, drawn: Array, price: Array, prices: Array, worst: float
) -> dict[str, Any] | None:
    """{"value", "low", "high", "reference", "arms": {arm: {"adds", "low", "high", "probability"}}}.

    means: (arm,) quality, higher is better; drawn: (arm, resample). price: (arm,); prices: (arm, resample) or (arm, 1).
    worst: the reference's quality. probability: share of resamples in which the arm adds to the area. Arms that cost
    nothing stand at the cheapest price that is something. None where prices have no range.
    """
    known = price[price > 0]
    if not len(known) or known.min() == known.max():
        return None
    cheapest, dearest = float(known.min()), float(known.max())
    end = (1 + BEYOND) * np.log(dearest / cheapest)

    def at(value: Array) -> Array:
        return np.clip(np.log(np.maximum(value, cheapest) / cheapest) / end, 0.0, 1.0)

    resamples = drawn.shape[1]
    # The point itself is the first column: it is no mean of the resamples.
    gain = np.concatenate([means[:, None], drawn], 1) - worst
    places = np.concatenate([at(price)[:, None], np.broadcast_to(at(prices), (len(names), resamples))], 1)
    order = np.argsort(places, 0, kind="stable")
    places = np.take_along_axis(places, order, 0)
    widths = np.diff(places, axis=0, append=1.0)
    whole = _area(np.take_along_axis(gain, order, 0), widths)
    arms = {}
    for number, name in enumerate(names):
        without = gain.copy()
        without[number] = 0.0
        added = whole - _area(np.take_along_axis(without, order, 0), widths)
        arms[name] = _interval(added, "adds") | {"probability": float((added[1:] > LEAST).mean())}
    reference = {"quality": float(worst), "price": float(cheapest * np.exp(end)), "cheapest": cheapest}
    return _interval(whole, "value") | {"reference": reference, "arms": arms}


def _area(gain: Array, widths: Array) -> Array:
    """(arm, draw), cheapest first -> (draw,): the best gain so far, times how long it is the best."""
    best = np.maximum.accumulate(np.maximum(gain, 0.0), 0)
    return (best * widths).sum(0)


def _interval(values: Array, name: str) -> dict[str, float]:
    """The point, and where 95 % of its resamples lie."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return {name: float(values[0]), "low": float(low), "high": float(high)}
