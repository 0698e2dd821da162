"""Successive halving of learning-rate trials: a part of the budget for every rate, twice as much for the better half.

(Jamieson & Talwalkar, 2016, arXiv:1502.07943.) The rungs follow from the number of rates alone, so that every arm has
the same ones. Each trial is a training of its own, with its whole schedule, over a share of the budget; rates are
compared within a rung, never across. The rung that would be left with one rate is the confirmation on new seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rung = tuple[int, float]  # how many rates, share of the budget of each


def rungs(rates: int) -> list[Rung]:
    """7 -> [(7, 1/4), (3, 1/2)]. A single rate is tried with the whole budget: there is nothing to save."""
    sizes = []
    while rates > 1:
        sizes.append(rates)
        rates //= 2
    return [(size, 0.5 ** (len(sizes) - place)) for place, size in enumerate(sizes)] or [(rates, 1.0)]


def trials_of(rates: int, is_halved: bool) -> list[Rung]:
    """The rungs of a search: one with everything where it is not halved."""
    return rungs(rates) if is_halved else [(rates, 1.0)]


def share_of(trial: Mapping[str, Any]) -> float:
    return trial.get("share") or 1.0


def first_rung(trials: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The trials that all rates had alike."""
    least = min((share_of(trial) for trial in trials), default=1.0)
    return [trial for trial in trials if share_of(trial) == least]


def last_rung(trials: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The trials that choose."""
    most = max((share_of(trial) for trial in trials), default=1.0)
    return [trial for trial in trials if share_of(trial) == most]


def best_rates(trials: Sequence[Mapping[str, Any]], count: int, higher_is_better: bool = True) -> list[float]:
    """The best `count` rates of a rung by the mean validation score over the tuning seeds; of equal ones the smaller.

    A rate at which any run diverged is worse than every rate at which none did.
    """
    sign = 1 if higher_is_better else -1
    values: dict[float, list[float]] = {}
    for trial in trials:
        value = sign * trial["validation"] if trial["status"] == "ok" else float("-inf")
        values.setdefault(trial["learning_rate"], []).append(value)
    ordered = sorted(values, key=lambda rate: (-round(sum(values[rate]) / len(values[rate]), 12), rate))
    return ordered[:count]
