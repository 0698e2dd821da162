"""From scores to what may be said: intervals, the best group, groups, the front, the recommendation.

The input is the same for runs made here and elsewhere: the `Scores` of all arms, higher is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from veneer.comparing.inference.scores import Scores
from veneer.comparing.inference.statistics import (
    Array,
    Difference,
    Interval,
    adjust,
    sign_flip_can_decide,
    smallest_for,
    spread,
)

LEVEL = 0.05


@dataclass(frozen=True)
class ArmResult:
    """What is known of one arm on the test split."""

    arm: str
    interval: Interval
    seed_deviation: float
    tied_with_best: bool
    p_adjusted: float
    front_probability: float
    group: tuple[int, ...] = ()


@dataclass(frozen=True)
class Contrast:
    """A planned difference with its corrected p-value."""

    first: str
    second: str
    difference: Difference
    p_adjusted: float

    @property
    def separable(self) -> bool:
        return self.p_adjusted <= LEVEL


@dataclass(frozen=True)
class Analysis:
    """All that is said about a comparison, arms in the order best first."""

    arms: tuple[ArmResult, ...]
    contrasts: tuple[Contrast, ...]
    contrasts_are_planned: bool
    correction: str
    groups: tuple[tuple[str, ...], ...]
    recommended: str
    best: str
    sign_flip_decides: bool
    seeds: int
    items: int
    smallest_found: float
    excluded: Mapping[str, str] = field(default_factory=dict)

    def arm(self, name: str) -> ArmResult:
        return next(result for result in self.arms if result.arm == name)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def analyse(
    scores: Scores,
    costs: Mapping[str, Mapping[str, Any]],
    contrasts: Sequence[tuple[str, str]] = (),
    correction: str = "holm",
    resamples: int = 2000,
) -> Analysis:
    """The analysis of decisions that were fixed before: nothing here looks at what it would like to find."""
    names = sorted(scores.of, key=lambda name: (-float(scores.of[name].mean()), name))
    pairs = _all_pairs(scores, names)
    p_best = best_group_p(names, pairs)
    front = front_probability(scores, names, costs, resamples)
    groups = groups_of(names, pairs)
    planned = bool(contrasts)
    wanted = list(contrasts) or [(names[0], name) for name in names[1:]]
    wanted = [pair for pair in wanted if pair[0] in scores.of and pair[1] in scores.of]
    found = [scores.difference(first, second) for first, second in wanted]
    corrected = adjust([one.p_value for one in found], correction)
    results = tuple(
        ArmResult(
            arm=name,
            interval=scores.interval(name),
            seed_deviation=_seed_deviation(scores.of[name]),
            tied_with_best=p_best[name] > LEVEL,
            p_adjusted=p_best[name],
            front_probability=front[name],
            group=tuple(number for number, members in enumerate(groups, start=1) if name in members),
        )
        for name in names
    )
    seeds = min(len(rows) for rows in scores.seeds.values())
    return Analysis(
        arms=results,
        contrasts=tuple(
            Contrast(first, second, one, float(p))
            for (first, second), one, p in zip(wanted, found, corrected, strict=True)
        ),
        contrasts_are_planned=planned,
        correction=correction,
        groups=groups,
        recommended=cheapest([r.arm for r in results if r.tied_with_best], costs),
        best=names[0],
        sign_flip_decides=sign_flip_can_decide(seeds, max(1, len(wanted))),
        seeds=seeds,
        items=scores.item_count,
        smallest_found=_smallest_found(found),
    )


Pairs = dict[tuple[str, str], Difference]


def _all_pairs(scores: Scores, names: Sequence[str]) -> Pairs:
    return {
        (first, second): scores.difference(first, second, flips=False)
        for place, first in enumerate(names)
        for second in names[place + 1 :]
    }


def _oriented(pairs: Pairs, first: str, second: str) -> Difference:
    if (first, second) in pairs:
        return pairs[first, second]
    return pairs[second, first].reversed()


def best_group_p(names: Sequence[str], pairs: Pairs) -> dict[str, float]:
    """For each arm, the p-value of "no other arm is better": comparisons with the best (Hsu, 1981).

    An arm leaves the best group when some other arm is better by a one-sided test, corrected for the k - 1
    others it is compared with (Bonferroni's form, which needs no assumption on how the tests hang together).
    The truly best arm leaves it with probability at most 0.05, however many arms there are: the chance that
    the apparent best owes its place to luck is accounted for, because every arm is tried against every other.
    """
    others = max(1, len(names) - 1)
    found = {}
    for name in names:
        beaten = [_oriented(pairs, other, name).p_greater for other in names if other != name]
        found[name] = min(1.0, others * min(beaten, default=1.0))
    return found


def best_group_p_of_array(scores: Array) -> Array:
    """`best_group_p` for many comparisons at once: (repeat, arm, seed, item) -> (repeat, arm)."""
    arms = scores.shape[1]
    beaten = np.ones((scores.shape[0], arms))
    for first in range(arms):
        for second in range(first + 1, arms):
            found = spread(scores[:, first] - scores[:, second])
            upper = found.p_greater()
            beaten[:, second] = np.minimum(beaten[:, second], upper)
            beaten[:, first] = np.minimum(beaten[:, first], 1 - upper)
    return np.minimum(1.0, (arms - 1) * beaten)


def groups_of(names: Sequence[str], pairs: Pairs) -> tuple[tuple[str, ...], ...]:
    """Maximal runs of arms (best first) in which no pair is separable, all pairs corrected by Holm."""
    keys = list(pairs)
    corrected = dict(zip(keys, adjust([pairs[key].p_value for key in keys], "holm"), strict=True))
    reach = []
    for start in range(len(names)):
        end = start
        while end + 1 < len(names) and all(
            corrected[names[inside], names[end + 1]] > LEVEL for inside in range(start, end + 1)
        ):
            end += 1
        reach.append(end)
    kept = [(start, end) for start, end in enumerate(reach) if start == 0 or end > reach[start - 1]]
    return tuple(tuple(names[start : end + 1]) for start, end in kept)


def front_probability(
    scores: Scores,
    names: Sequence[str],
    costs: Mapping[str, Mapping[str, Any]],
    resamples: int = 2000,
    cost: str = "trainable_parameters",
) -> dict[str, float]:
    """Share of resamples in which no other arm is at least as good for less, or better for as little.

    An arm without a known cost has probability 0.
    """
    price = np.array([_number(costs.get(name, {}).get(cost)) for name in names])
    return on_front(names, drawn_means(scores, names, resamples), price[:, None])


def drawn_means(scores: Scores, names: Sequence[str], resamples: int = 2000) -> Array:
    """(arm, resample) mean scores, drawn for all arms together (see `Scores.resampled`)."""
    return scores.resampled(names, resamples)


def on_front(names: Sequence[str], quality: Array, price: Array) -> dict[str, float]:
    """Share of resamples in which nothing dominates the arm. quality: (arm, resample), higher is better;
    price: (arm, resample) or (arm, 1), NaN where unknown.
    """
    found = {}
    for place, name in enumerate(names):
        cheaper = price <= price[place]
        better = quality >= quality[place] - 1e-12
        strictly = (price < price[place]) | (quality > quality[place] + 1e-12)
        dominated = (cheaper & better & strictly).any(0)
        found[name] = 0.0 if np.isnan(price[place]).any() else float(1 - dominated.mean())
    return found


def cheapest(names: Sequence[str], costs: Mapping[str, Mapping[str, Any]]) -> str:
    """The fewest trained parameters, then the shortest step, then the order given (best first)."""

    def price(name: str) -> tuple[float, float]:
        known = costs.get(name, {})
        return tuple(  # type: ignore[return-value]
            np.inf if np.isnan(value := _number(known.get(key))) else value
            for key in ("trainable_parameters", "step_seconds")
        )

    return min(names, key=price)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _seed_deviation(scores: Array) -> float:
    return float(scores.mean(1).std(ddof=1)) if len(scores) > 1 else float("nan")


def _smallest_found(found: Sequence[Difference]) -> float:
    """The smallest difference that the design could find (power 0.8), from the variances that were met.

    The median over the half of the contrasts whose arms lie closest: a contrast with an arm at chance level
    has a far larger variance, and nobody asks whether it can be found.
    """
    closest = sorted(found, key=lambda one: abs(one.estimate))[: (len(found) + 1) // 2]
    sizes = [smallest_for(one.spread, len(found)) for one in closest if one.spread is not None]
    return float(np.median(sizes)) if sizes else 0.0
