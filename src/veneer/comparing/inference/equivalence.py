"""Tests that ask for more than "different": equality within a margin, the order of arms, shares of variance.

"Not separable" does not mean equal. That two arms are equal within a margin is shown by two one-sided tests; that
an order is another one by pairs that are turned round and separable both times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from veneer.comparing.inference.scores import Scores
from veneer.comparing.inference.statistics import Array, Difference, adjust


@dataclass(frozen=True)
class Equivalence:
    """p_equal: of "the difference is not within the margin"; p_beyond: of "it is not beyond the margin"."""

    margin: float
    p_equal: float
    p_beyond: float


def equivalence(difference: Difference, margin: float) -> Equivalence:
    """Two one-sided tests (Schuirmann, 1987) on the interval of `difference`, crossed seeds and items.

    p_equal <= 0.05 exactly where the 90 % interval lies within +-margin.
    """
    found = difference.spread
    if found is None:
        raise ValueError("the difference carries no spread")
    above = float(replace(found, estimate=found.estimate + margin).p_greater())  # of: not above -margin
    below = 1 - float(replace(found, estimate=found.estimate - margin).p_greater())  # of: not below +margin
    return Equivalence(margin, max(above, below), min(1.0, 2 * min(1 - above, 1 - below)))


@dataclass(frozen=True)
class Orders:
    """Two orders of the same arms: Kendall's tau with its resampled interval, and pairs that are surely reversed."""

    tau: float
    low: float
    high: float
    reversed_pairs: tuple[tuple[str, str], ...]


def orders(one: Scores, two: Scores, resamples: int = 2000, level: float = 0.05) -> Orders:
    """Compare the orders of the arms that both have.

    Resampling adds noise to both orders, so that the interval leans towards 0: it shows that orders are alike, and
    never that they differ. For that a pair counts that is separable in both, the other way round, all pairs of
    both corrected by Holm.
    """
    arms = [arm for arm in one.of if arm in two.of]
    means = [np.array([scores.of[arm].mean() for arm in arms]) for scores in (one, two)]
    drawn = _tau(one.resampled(arms, resamples), two.resampled(arms, resamples))
    low, high = np.quantile(drawn, (0.025, 0.975))
    pairs = [(first, second) for place, first in enumerate(arms) for second in arms[place + 1 :]]
    gaps = [[scores.difference(*pair, flips=False) for pair in pairs] for scores in (one, two)]
    corrected = adjust([gap.p_value for of in gaps for gap in of]).reshape(2, -1)
    turned = tuple(
        pair
        for pair, a, b, p in zip(pairs, *gaps, corrected.T, strict=True)
        if (p <= level).all() and a.estimate * b.estimate < 0
    )
    tau = float(_tau(means[0][:, None], means[1][:, None])[0])
    return Orders(tau, float(low), float(high), turned)


def _tau(one: Array, two: Array) -> Array:
    """Kendall's tau of two (arm, resample): the mean over pairs of whether both have them the same way round."""
    first, second = np.triu_indices(len(one), 1)
    return (np.sign(one[first] - one[second]) * np.sign(two[first] - two[second])).mean(0)


@dataclass(frozen=True)
class VarianceShare:
    """The share of variance that the factors and their interaction explain, with its interval, and of each alone."""

    share: float
    low: float
    high: float
    of: dict[str, float]


def variance_share(values: Array, names: Sequence[str] = ("first", "second")) -> VarianceShare:
    """Of a balanced design: (first factor, second factor, seed) -> shares of the variance of a single run.

    Points are omega squared (Hays, 1963). The interval inverts the noncentral F distribution of the test that all
    cells are equal (Steiger, 2004).
    """
    from scipy import optimize, stats

    rows, columns, seeds = values.shape
    count, cells = values.size, values.mean(2)
    of_rows, of_columns, whole = cells.mean(1), cells.mean(0), cells.mean()
    sums = {
        names[0]: (columns * seeds * ((of_rows - whole) ** 2).sum(), rows - 1),
        names[1]: (rows * seeds * ((of_columns - whole) ** 2).sum(), columns - 1),
        "together": (
            seeds * ((cells - of_rows[:, None] - of_columns[None] + whole) ** 2).sum(),
            (rows - 1) * (columns - 1),
        ),
    }
    left, freedom = ((values - cells[..., None]) ** 2).sum(), rows * columns * (seeds - 1)
    error = max(left / freedom, 1e-30)
    total = left + sum(of for of, _ in sums.values())
    points = {name: float(max(0.0, (of - df * error) / (total + error))) for name, (of, df) in sums.items()}
    df_cells = rows * columns - 1
    ratio = sum(of for of, _ in sums.values()) / df_cells / error

    def share_at(tail: float) -> float:
        if stats.f.cdf(ratio, df_cells, freedom) <= tail:
            return 0.0
        top = 10.0 * (ratio * df_cells + 10)
        top = top if stats.ncf.cdf(ratio, df_cells, freedom, top) < tail else 10 * top
        found = optimize.brentq(lambda size: stats.ncf.cdf(ratio, df_cells, freedom, size) - tail, 0.0, top)
        return found / (found + count)

    return VarianceShare(sum(points.values()), share_at(0.975), share_at(0.025), points)


@dataclass(frozen=True)
class Slope:
    """Change of log10 of the deviation over seeds when trained parameters grow tenfold, with its interval."""

    slope: float
    low: float
    high: float
    arms: int


def slope_of_deviation(deviations: Array, parameters: Array, seeds: int) -> Slope:
    """Of arms with at least two sizes: (arm,) deviations over `seeds` seeds, and trained parameters.

    The t interval of the regression; its error is at least that of deviations that are estimated from so few
    seeds, 1 / (2 (S - 1)) for their logarithm.
    """
    from scipy import stats

    x, y = np.log10(parameters), np.log10(np.maximum(deviations, 1e-12))
    fitted = stats.linregress(x, y)
    known = (0.5 / (seeds - 1)) ** 0.5 / np.log(10) / np.sqrt(((x - x.mean()) ** 2).sum())
    half = float(stats.t.ppf(0.975, len(x) - 2)) * max(float(fitted.stderr), float(known))
    return Slope(float(fitted.slope), float(fitted.slope) - half, float(fitted.slope) + half, len(x))
