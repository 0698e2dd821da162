"""What the trials of the learning rate say: how much tuning an arm needs, and how well it was tuned.

A reader who distrusts a comparison asks first whether the losers were tuned as hard as the winner. All trials
of all arms are therefore shown, with what the best of n of them would have given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.comparing.planning.halving import first_rung

Trial = Mapping[str, Any]  # arm, learning_rate, seed, validation, status


def expected_best(values: Sequence[float], higher_is_better: bool = True) -> list[float]:
    """The expected best of n trials for n = 1 ... N, of N values that were seen (Dodge et al., 2019).

    Exact for n draws with replacement from the N values: with v_1 <= ... <= v_N,
    E[max of n] = sum_i v_i ((i / N)^n - ((i - 1) / N)^n).
    """
    sign = 1.0 if higher_is_better else -1.0
    ordered = sorted(sign * value for value in values)
    count = len(ordered)
    return [
        sign
        * math.fsum(
            value * ((place / count) ** n - ((place - 1) / count) ** n)
            for place, value in enumerate(ordered, start=1)
        )
        for n in range(1, count + 1)
    ]


@dataclass(frozen=True)
class Tuned:
    """The trials of one arm. means: {rate: mean validation score}, None where a run at that rate diverged."""

    arm: str
    means: Mapping[float, float | None]
    chosen: float
    diverged: int
    trials: int
    neighbour_loss: float | None
    at_edge: bool


def tuned(arm: str, trials: Sequence[Trial], chosen: float, higher_is_better: bool = True) -> Tuned:
    """How the chosen rate lies among those tried.

    neighbour_loss: what the worse of the two neighbouring rates costs, in the metric; None where it diverged or
    there is none. at_edge: the chosen rate is the smallest or largest tried, so that a better may lie beyond.
    """
    by_rate: dict[float, list[Trial]] = {}
    for trial in first_rung(trials):  # all rates alike, where the better ones were tried again on more
        by_rate.setdefault(trial["learning_rate"], []).append(trial)
    means: dict[float, float | None] = {}
    for rate in sorted(by_rate):
        ok = [t["validation"] for t in by_rate[rate] if t["status"] == "ok"]
        means[rate] = sum(ok) / len(ok) if len(ok) == len(by_rate[rate]) else None
    rates = list(means)
    place = rates.index(chosen)
    sign = 1.0 if higher_is_better else -1.0
    beside = [means[rate] for rate in rates[max(0, place - 1) : place + 2] if rate != chosen]
    here = means[chosen]
    known = here is not None and beside and all(value is not None for value in beside)
    loss = max(sign * (here - value) for value in beside) if known else None  # type: ignore[operator]
    return Tuned(
        arm=arm,
        means=means,
        chosen=chosen,
        diverged=sum(trial["status"] != "ok" for trial in trials),
        trials=len(trials),
        neighbour_loss=loss,
        at_edge=len(rates) > 1 and place in (0, len(rates) - 1),
    )


def scores_for_best_of(trials: Sequence[Trial], worst: float | None) -> list[float]:
    """The mean validation score of each rate; a rate at which a run diverged counts as `worst`, if that is known."""
    by_rate: dict[float, list[float | None]] = {}
    for trial in first_rung(trials):
        value = trial["validation"] if trial["status"] == "ok" else worst
        by_rate.setdefault(trial["learning_rate"], []).append(value)
    return [sum(v) / len(v) for v in by_rate.values() if all(one is not None for one in v)]  # type: ignore[arg-type]
