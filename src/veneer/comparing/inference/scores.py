"""What is known of each arm's quality, and what follows from it: intervals, differences, resampled means.

Usually a matrix of item scores, one row a seed, the same items in the same order for all arms. Tables that were
published have one number a run; less follows from those, and it follows here, so that the analysis is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from veneer.comparing.inference.statistics import (
    Array,
    Difference,
    Interval,
    crossed_interval,
    difference,
    difference_of,
    interval_of,
    sign_flip,
    spread_of_run_difference,
    spread_of_runs,
)


@dataclass(frozen=True)
class Scores:
    """`of[arm]`: (seed, item); `seeds[arm]` names its rows, `items` the columns."""

    of: Mapping[str, Array]
    seeds: Mapping[str, tuple[Any, ...]]
    items: tuple[str, ...]

    def same_seeds(self, first: str, second: str) -> bool:
        return self.seeds[first] == self.seeds[second]

    @property
    def item_count(self) -> int:
        return len(self.items)

    def interval(self, arm: str) -> Interval:
        return crossed_interval(self.of[arm])

    def difference(self, first: str, second: str, flips: bool = True) -> Difference:
        """`first - second`, paired by item, and by run where both have the same seeds."""
        return difference(self.of[first], self.of[second], self.same_seeds(first, second), flips=flips)

    def turned(self) -> Scores:
        """With the sign of all scores changed, where lower is better."""
        return replace(self, of={arm: -of for arm, of in self.of.items()})

    def only(self, items: Sequence[str]) -> Scores:
        """Some of the items, in the order given."""
        place = {item: number for number, item in enumerate(self.items)}
        columns = np.array([place[item] for item in items])
        return replace(self, of={arm: of[:, columns] for arm, of in self.of.items()}, items=tuple(items))

    def resampled(self, arms: Sequence[str], resamples: int) -> Array:
        """Means of (arm, resample). One draw of items serves all arms and seeds; seeds are drawn S - 1 at a
        time, which keeps the variance of their mean unbiased."""
        rng = np.random.default_rng(0)
        items = len(self.items)
        weights = rng.multinomial(items, np.full(items, 1 / items), size=resamples) / items
        drawn: dict[tuple[Any, ...], Array] = {}
        means = np.empty((len(arms), resamples))
        for place, arm in enumerate(arms):
            seeds = self.seeds[arm]
            if seeds not in drawn:
                count = max(1, len(seeds) - 1)
                shares = np.full(len(seeds), 1 / len(seeds))
                drawn[seeds] = rng.multinomial(count, shares, size=resamples) / count
            means[place] = np.einsum("rs,rs->r", weights @ self.of[arm].T, drawn[seeds])
        return means


@dataclass(frozen=True)
class RunScores(Scores):
    """One number a run, as published tables have: `of[arm]` is (seed, 1).

    right_or_wrong: of how many items each number is the share of right ones, where that is known. Which items
    they were is not, so that nothing is paired by item.
    """

    right_or_wrong: int | None = None

    @property
    def item_count(self) -> int:
        return self.right_or_wrong or 0

    def interval(self, arm: str) -> Interval:
        values = self.of[arm][:, 0]
        bounded = self.right_or_wrong if (values >= 0).all() else None
        return interval_of(spread_of_runs(values, self.right_or_wrong), len(values) == 1, bounded)

    def difference(self, first: str, second: str, flips: bool = True) -> Difference:
        one, two = self.of[first][:, 0], self.of[second][:, 0]
        same = self.same_seeds(first, second)
        one_seed = min(len(one), len(two)) == 1
        flip = sign_flip(one - two) if flips and same and not one_seed else None
        found = spread_of_run_difference(one, two, self.right_or_wrong, same and not one_seed)
        return difference_of(found, one_seed, flip)

    def resampled(self, arms: Sequence[str], resamples: int) -> Array:
        """Means of (arm, resample), drawn from the normal distribution of each arm's own spread."""
        rng = np.random.default_rng(0)
        found = [spread_of_runs(self.of[arm][:, 0], self.right_or_wrong) for arm in arms]
        noise = rng.standard_normal((len(arms), resamples))
        return np.array(
            [one.estimate + one.standard_error * row for one, row in zip(found, noise, strict=True)]
        )
