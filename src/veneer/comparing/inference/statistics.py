"""Intervals, differences and corrections for scores that are crossed: the same test items for every seed.

A score is x[s, i] = mean + seed_s + item_i + rest_si. Both seeds and items are samples, so the variance of
the grand mean has two sources, and resampling items within each seed (as if every seed had a test set of its
own) covers far too seldom. The variance is estimated by its analysis-of-variance components

    V = A + B - C      A = var(seed means) / S      B = var(item means) / n      C = residual / (S n)

(C is in both A and B, hence subtracted once), and each component has the quantile of its own degrees of
freedom, as in Graybill and Wang (1980) for sums of variance components; what is subtracted has both:

    half width^2 = t(n-1)^2 B + max(0, t(S-1)^2 A - t(S-1) t(n-1) C)

With few seeds a common t with estimated degrees of freedom (Satterthwaite) is right at 0.95 and wrong in the
tails that corrections for many contrasts need: where A came out small by chance, its degrees of freedom come
out large. `selftest.self_test` measures the coverage and the error over families of contrasts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CONFIDENCE = 0.95
MANY = 1e9  # degrees of freedom of a variance that is known


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval. `items_only`: one seed, so that the spread over seeds is unknown."""

    estimate: float
    low: float
    high: float
    standard_error: float
    items_only: bool = False


@dataclass(frozen=True)
class Difference(Interval):
    """`first - second`, its two-sided p on the interval, and the sign-flip p over seeds for comparison.

    p_greater is one-sided: how likely so large a value is if first is no better than second.
    """

    p_value: float = 1.0
    p_greater: float = 0.5
    sign_flip_p: float | None = None
    spread: Spread | None = None

    def reversed(self) -> Difference:
        """`second - first`."""
        return replace(
            self,
            estimate=-self.estimate,
            low=-self.high,
            high=-self.low,
            p_greater=1 - self.p_greater,
        )


@dataclass(frozen=True)
class Spread:
    """The estimate and the three components of its variance: arrays of one shape, or numbers."""

    estimate: Any
    from_seeds: Any
    from_items: Any
    shared: Any
    seed_df: Any
    item_df: Any

    @property
    def standard_error(self) -> Any:
        return np.sqrt(self.from_items + np.maximum(self.from_seeds - self.shared, 0.0))

    def half_width(self, tail: Any) -> Any:
        """Half the width of the interval that leaves `tail` on each side."""
        seeds, items = _upper_t(self.seed_df, tail), _upper_t(self.item_df, tail)
        added = np.maximum(seeds**2 * self.from_seeds - seeds * items * self.shared, 0.0)
        return np.sqrt(items**2 * self.from_items + added)

    def p_greater(self) -> Any:
        """One-sided p of "the mean is not above zero": the tail at which the interval just touches zero."""
        size = np.abs(np.asarray(self.estimate, dtype=np.float64))
        low, high = np.full_like(size, -16.0), np.full_like(size, np.log10(0.5))  # of the tail's logarithm
        for _ in range(40):
            middle = (low + high) / 2
            outside = self.half_width(10.0**middle) < size
            low, high = np.where(outside, low, middle), np.where(outside, middle, high)
        tail = np.where(size > 0, 10.0**high, 0.5)
        return np.where(np.asarray(self.estimate) >= 0, tail, 1 - tail)


def _upper_t(degrees: Any, tail: Any) -> Any:
    from scipy import special

    return -special.stdtrit(degrees, tail)  # by the lower tail, which keeps its digits when it is tiny


def spread(scores: Array) -> Spread:
    """Spread of the grand mean of `scores`: (..., seed, item), seeds and items crossed and both random."""
    seeds, items = scores.shape[-2:]
    mean = scores.mean((-2, -1))
    item_means = scores.mean(-2)
    from_items = item_means.var(-1, ddof=1) / items
    if seeds == 1:
        nothing = np.zeros_like(mean)
        return Spread(mean, nothing, from_items, nothing, 1.0, items - 1.0)
    seed_means = scores.mean(-1)
    from_seeds = seed_means.var(-1, ddof=1) / seeds
    rest = scores - seed_means[..., :, None] - item_means[..., None, :] + mean[..., None, None]
    shared = (rest**2).sum((-2, -1)) / ((seeds - 1) * (items - 1)) / (seeds * items)
    # Equal scores leave rounding noise of 1e-34 behind, which must not look like a spread.
    from_seeds, from_items, shared = (np.where(x < 1e-24, 0.0, x) for x in (from_seeds, from_items, shared))
    return Spread(mean, from_seeds, from_items, shared, seeds - 1.0, items - 1.0)


def spread_of_difference(first: Array, second: Array, same_seeds: bool = True) -> Spread:
    """Spread of `mean(first) - mean(second)`; each (..., seed, item), over the same items.

    With the same seeds the difference is taken run by run. With other seeds (or other numbers of seeds) the
    two seed variances add, while items stay paired.
    """
    if same_seeds:
        return spread(first - second)
    one, two = spread(first), spread(second)
    gap = spread((first.mean(-2) - second.mean(-2))[..., None, :])
    from_seeds = one.from_seeds + two.from_seeds
    noise = one.from_seeds**2 / one.seed_df + two.from_seeds**2 / two.seed_df
    degrees = np.divide(from_seeds**2, noise, out=np.ones_like(np.asarray(noise)), where=noise > 0)
    return Spread(
        gap.estimate, from_seeds, gap.from_items, one.shared + two.shared, degrees, gap.item_df
    )  # the degrees of freedom of two variances: Welch and Satterthwaite


def spread_of_runs(values: Array, items: int | None = None) -> Spread:
    """Spread of the mean of `values`: (seed,), one number a run, where scores of items are not known.

    items: of how many right-or-wrong items each value is the share; their binomial variance then counts too.
    Without it the spread is that over seeds alone, and nothing is said about other items.
    """
    seeds, mean = len(values), values.mean()
    from_seeds = values.var(ddof=1) / seeds if seeds > 1 else 0.0
    share = min(1.0, abs(float(mean)))  # the sign is turned where lower is better
    from_items = share * (1 - share) / items if items else 0.0
    return Spread(mean, from_seeds, from_items, 0.0, max(1.0, seeds - 1.0), MANY)


def spread_of_run_difference(
    first: Array, second: Array, items: int | None = None, same_seeds: bool = True
) -> Spread:
    """Spread of `mean(first) - mean(second)`; each (seed,), one number a run.

    Which items both got right is not known, so that their binomial variances add: wider than a paired interval.
    """
    one, two = spread_of_runs(first, items), spread_of_runs(second, items)
    if same_seeds:
        from_seeds, degrees = spread_of_runs(first - second).from_seeds, one.seed_df
    else:
        from_seeds = one.from_seeds + two.from_seeds
        noise = one.from_seeds**2 / one.seed_df + two.from_seeds**2 / two.seed_df
        degrees = from_seeds**2 / noise if noise > 0 else 1.0
    return Spread(
        one.estimate - two.estimate, from_seeds, one.from_items + two.from_items, 0.0, degrees, MANY
    )


def crossed_interval(scores: Array, confidence: float = CONFIDENCE) -> Interval:
    """Interval of the mean of `scores` (seed, item), for new seeds and new items alike.

    Scores that are all 0 or all 1 have no spread to estimate; the bound of n equal trials
    (1 - alpha^(1/n), the "rule of three") stands in for it.
    """
    items = scores.shape[1] if is_binary(scores) else None
    return interval_of(spread(scores), scores.shape[0] == 1, items, confidence)


def interval_of(
    found: Spread, items_only: bool = False, right_or_wrong: int | None = None, confidence: float = CONFIDENCE
) -> Interval:
    """The interval that a spread gives. right_or_wrong: the number of items, where the scores are 0 or 1."""
    estimate, error = float(found.estimate), float(found.standard_error)
    half = float(found.half_width((1 - confidence) / 2))
    low, high = estimate - half, estimate + half
    if right_or_wrong:
        low, high = max(0.0, low), min(1.0, high)
        if error == 0.0 and estimate in (0.0, 1.0):
            slack = 1 - (1 - confidence) ** (1 / right_or_wrong)
            low, high = (low - slack, high) if estimate > 0.5 else (low, high + slack)
    return Interval(estimate, low, high, error, items_only)


def difference(
    first: Array, second: Array, same_seeds: bool = True, confidence: float = CONFIDENCE, flips: bool = True
) -> Difference:
    """`mean(first) - mean(second)` over crossed seeds and the same items, each (seed, item).

    flips: with the sign-flip test, where the seeds are shared.
    """
    one_seed = min(first.shape[0], second.shape[0]) == 1
    flip = sign_flip(first.mean(1) - second.mean(1)) if flips and same_seeds and not one_seed else None
    items = first.shape[1] if is_binary(first) and is_binary(second) else None
    return difference_of(spread_of_difference(first, second, same_seeds), one_seed, flip, items, confidence)


def difference_of(
    found: Spread,
    items_only: bool = False,
    flip: float | None = None,
    right_or_wrong: int | None = None,
    confidence: float = CONFIDENCE,
) -> Difference:
    """The difference that a spread gives, with its p."""
    estimate, error = float(found.estimate), float(found.standard_error)
    half = float(found.half_width((1 - confidence) / 2))
    if error == 0.0 and right_or_wrong:
        half = 1 - (1 - confidence) ** (1 / right_or_wrong)
    p_greater = float(found.p_greater())
    return Difference(
        estimate,
        estimate - half,
        estimate + half,
        error,
        items_only=items_only,
        p_value=min(1.0, 2 * min(p_greater, 1 - p_greater)),
        p_greater=p_greater,
        sign_flip_p=flip,
        spread=found,
    )


def is_binary(scores: Array) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def smallest_for(found: Spread, contrasts: int = 1, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest difference found with probability `power` at `level`, corrected for `contrasts`.

    `found` holds the variance components that are expected; how they scatter around that when they are
    estimated from few seeds is drawn (4000 times, always the same draws).
    """
    from scipy import optimize, stats

    error = float(found.standard_error)
    if error <= 0:
        return 0.0
    rng = np.random.default_rng(0)
    drawn = replace(
        found,
        from_seeds=found.from_seeds * rng.chisquare(found.seed_df, 4000) / found.seed_df,
        from_items=found.from_items * rng.chisquare(found.item_df, 4000) / found.item_df,
    )
    half = drawn.half_width(level / (2 * max(1, contrasts)))
    return float(
        optimize.brentq(
            lambda shift: stats.norm.cdf((shift - half) / error).mean() - power,
            0.0,
            5 * half.max() + 10 * error,
        )
    )


def adjust(p_values: Any, how: str = "holm") -> Array:
    """p-values (..., contrast) corrected for their number: "holm" (planned) or "fdr_bh" (screens)."""
    from scipy import stats

    p = np.asarray(p_values, dtype=np.float64)
    if p.shape[-1] == 0:
        return p
    if how == "fdr_bh":
        return stats.false_discovery_control(p, axis=-1, method="bh")
    order = p.argsort(-1)
    # Holm (1979): the k-th smallest of m is tried at level / (m - k + 1), and only if all smaller ones fell.
    stepped = np.take_along_axis(p, order, -1) * np.arange(p.shape[-1], 0, -1)
    found = np.empty_like(p)
    np.put_along_axis(found, order, np.minimum(1.0, np.maximum.accumulate(stepped, -1)), -1)
    return found


def sign_flip(differences: Array) -> float:
    """Exact two-sided sign-flip p over seeds: (seed,) differences of paired runs.

    Its smallest value is 2^(1-S), whatever the effect: see `sign_flip_can_decide`.
    """
    from scipy import stats

    if not np.any(differences):
        return 1.0
    exact = len(differences) <= 16
    found = stats.permutation_test(
        (differences,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf if exact else 20_000,
        alternative="two-sided",
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def sign_flip_can_decide(seeds: int, contrasts: int, level: float = 0.05) -> bool:
    """Whether `contrasts` corrected sign-flip tests over `seeds` seeds can ever fall below `level`."""
    return contrasts * 2.0 ** (1 - seeds) <= level
