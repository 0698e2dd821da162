"""Intervals, differences and corrections for scores that are crossed: the same test items for every seed.

A score is x[s, i] = mean + seed_s + item_i + rest_si. Both seeds and items are samples, so the variance of the
grand mean has two sources, and resampling items within each seed (as if every seed had a test set of its own)
covers far too seldom. Here the variance is estimated by its analysis-of-variance components

    V = A + B - C      A = var(seed means) / S      B = var(item means) / n      C = residual / (S n)

(C is in both A and B, hence subtracted once; A <= C counts as no variance of seeds), and the interval is t with
Satterthwaite's degrees of freedom: near S - 1 where seeds dominate, near n - 1 where items do. It is the
reader-and-case analysis of diagnostic imaging (Obuchowski and Rockette, 1995; Hillis, 2007).
`simulation.self_test` measures its coverage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval. `items_only`: one seed, so that the spread over seeds is unknown."""

    estimate: float
    low: float
    high: float
    standard_error: float
    degrees: float
    items_only: bool = False


@dataclass(frozen=True)
class Difference(Interval):
    """`first - second`, its two-sided p on the interval, and the sign-flip p over seeds for comparison."""

    p_value: float = 1.0
    p_greater: float = 0.5  # one-sided: how likely is so large a value if first is not above second
    sign_flip_p: float | None = None


@dataclass(frozen=True)
class Spread:
    """Estimate, variance of the estimate, Satterthwaite's degrees of freedom: arrays of the leading shape."""

    estimate: Any
    variance: Any
    degrees: Any


def spread(scores: Array) -> Spread:
    """Variance of the grand mean of `scores`: (..., seed, item), seeds and items crossed and both random."""
    seeds, items = scores.shape[-2:]
    mean = scores.mean((-2, -1))
    item_means = scores.mean(-2)
    from_items = item_means.var(-1, ddof=1) / items
    if seeds == 1:
        return Spread(mean, from_items, np.full_like(mean, items - 1.0))
    seed_means = scores.mean(-1)
    from_seeds = seed_means.var(-1, ddof=1) / seeds
    rest = scores - seed_means[..., :, None] - item_means[..., None, :] + mean[..., None, None]
    shared = (rest**2).sum((-2, -1)) / ((seeds - 1) * (items - 1)) / (seeds * items)
    return _combine(mean, from_seeds, from_items, shared, seeds - 1.0, items - 1.0)


def _combine(
    mean: Any, from_seeds: Any, from_items: Any, shared: Any, seed_df: Any, item_df: float
) -> Spread:
    # Where the seeds differ by no more than the residual explains, their component is set to zero: V = B.
    # Simulated: a degrees-of-freedom term for a component that is not there covers 0.98 where it should 0.95,
    # and the term without its share of the residual (A - C, as in Hillis) 0.92 where seeds dominate.
    seeds_differ = from_seeds > shared
    variance = from_items + np.where(seeds_differ, from_seeds - shared, 0.0)
    noise = np.where(seeds_differ, from_seeds**2 / seed_df, 0.0) + from_items**2 / item_df
    with np.errstate(divide="ignore", invalid="ignore"):
        degrees = np.where(noise > 0, variance**2 / noise, item_df)
    return Spread(mean, variance, np.clip(degrees, 1.0, None))


def spread_of_difference(first: Array, second: Array, same_seeds: bool = True) -> Spread:
    """Spread of `mean(first) - mean(second)`; each (seed, item), over the same items.

    With the same seeds the difference is taken run by run. With other seeds (or other numbers of seeds) the
    two seed variances add, while items stay paired.
    """
    if same_seeds:
        return spread(first - second)
    items = first.shape[-1]
    item_means = first.mean(0) - second.mean(0)
    from_items = item_means.var(ddof=1) / items
    parts = [_seed_parts(scores) for scores in (first, second)]
    from_seeds = sum(part[0] for part in parts)
    shared = sum(part[1] for part in parts)
    noise = sum(part[0] ** 2 / part[2] for part in parts if part[2] > 0)
    seed_df = from_seeds**2 / noise if noise > 0 else 1.0
    return _combine(np.asarray(item_means.mean()), from_seeds, from_items, shared, seed_df, items - 1.0)


def _seed_parts(scores: Array) -> tuple[float, float, float]:
    seeds, items = scores.shape
    if seeds == 1:
        return 0.0, 0.0, 0.0
    seed_means, item_means, mean = scores.mean(-1), scores.mean(-2), scores.mean()
    rest = scores - seed_means[:, None] - item_means[None, :] + mean
    shared = float((rest**2).sum()) / ((seeds - 1) * (items - 1)) / (seeds * items)
    return float(seed_means.var(ddof=1)) / seeds, shared, seeds - 1.0


def crossed_interval(scores: Array, confidence: float = CONFIDENCE) -> Interval:
    """Interval of the mean of `scores` (seed, item), for new seeds and new items alike.

    Scores that are all 0 or all 1 have no spread to estimate; the bound of n equal trials
    (1 - alpha^(1/n), the "rule of three") stands in for it.
    """
    found = spread(scores)
    estimate, error, degrees = float(found.estimate), float(found.variance) ** 0.5, float(found.degrees)
    half = _t_quantile(1 - (1 - confidence) / 2, degrees) * error
    low, high = estimate - half, estimate + half
    if is_binary(scores):
        low, high = max(0.0, low), min(1.0, high)
        if error == 0.0:
            slack = 1 - (1 - confidence) ** (1 / scores.shape[1])
            low, high = (low - slack, high) if estimate > 0.5 else (low, high + slack)
    return Interval(estimate, low, high, error, degrees, items_only=scores.shape[0] == 1)


def difference(
    first: Array, second: Array, same_seeds: bool = True, confidence: float = CONFIDENCE
) -> Difference:
    """`mean(first) - mean(second)` over crossed seeds and the same items, each (seed, item)."""
    from scipy import stats

    found = spread_of_difference(first, second, same_seeds)
    estimate, error, degrees = float(found.estimate), float(found.variance) ** 0.5, float(found.degrees)
    if error == 0.0:
        p_greater = 0.5 if estimate == 0 else float(estimate < 0)
    else:
        p_greater = float(stats.t.sf(estimate / error, degrees))
    half = _t_quantile(1 - (1 - confidence) / 2, degrees) * error
    if error == 0.0 and is_binary(first) and is_binary(second):
        half = 1 - (1 - confidence) ** (1 / first.shape[1])
    one_seed = min(first.shape[0], second.shape[0]) == 1
    flips = None if one_seed or not same_seeds else sign_flip(first.mean(1) - second.mean(1))
    return Difference(
        estimate,
        estimate - half,
        estimate + half,
        error,
        degrees,
        items_only=one_seed,
        p_value=min(1.0, 2 * min(p_greater, 1 - p_greater)),
        p_greater=p_greater,
        sign_flip_p=flips,
    )


def is_binary(scores: Array) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def _t_quantile(probability: float, degrees: float) -> float:
    from scipy import stats

    return float(stats.t.ppf(probability, degrees))


def adjust(p_values: Sequence[float], how: str = "holm") -> list[float]:
    """p-values corrected for their number: "holm" (planned contrasts) or "fdr_bh" (screens)."""
    from statsmodels.stats.multitest import multipletests

    if not len(p_values):
        return []
    return [float(p) for p in multipletests(list(p_values), method=how)[1]]


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
