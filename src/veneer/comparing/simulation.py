"""A self-test: the statistics, tried on scores whose truth is known.

Right-or-wrong scores are drawn from a latent normal: an item is easy or hard for all arms, a little more so
for one of them; a seed is lucky or not. The truth follows in closed form, so that one can count how often an
interval holds it, how often equal arms are called different, and how often a real difference is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from veneer.comparing.analysis import best_group_p_of_array
from veneer.comparing.statistics import Array, Spread, smallest_for, spread

COVERAGE = (0.93, 0.97)
RATIOS = (0.1, 1.0, 10.0)
"""Variance of the mean difference that comes from seeds, over that which comes from items."""


@dataclass(frozen=True)
class SelfTest:
    """What was measured, with the bound that it has to keep."""

    coverage: dict[float, float]
    family_error: dict[float, float]
    best_kept: dict[float, float]
    power: float
    seeds: int
    items: int
    repeats: int

    @property
    def passed(self) -> bool:
        """Within the bounds, with two standard errors of the simulation for those that are one-sided."""
        slack = 2 * (0.05 * 0.95 / self.repeats) ** 0.5
        return (
            all(COVERAGE[0] <= value <= COVERAGE[1] for value in self.coverage.values())
            and all(value <= 0.05 + slack for value in self.family_error.values())
            and all(value >= 0.95 - slack for value in self.best_kept.values())
            and self.power >= 0.8 - 2 * (0.8 * 0.2 / self.repeats) ** 0.5
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        lines = [f"{self.repeats} simulated comparisons, {self.seeds} seeds, {self.items} test items"]
        lines.append("seeds : items   coverage (0.93 to 0.97)   family error (<= 0.05)   best kept (>= 0.95)")
        for ratio, covered in self.coverage.items():
            lines.append(
                f"{ratio:>13g}   {covered:>23.3f}   {self.family_error[ratio]:>22.3f}"
                f"   {self.best_kept[ratio]:>19.3f}"
            )
        lines.append(f"power at the difference that the forecast names: {self.power:.3f} (0.8)")
        lines.append("passed" if self.passed else "NOT PASSED")
        return "\n".join(lines)


def self_test(
    seeds: int = 6,
    items: int = 300,
    ratios: Sequence[float] = RATIOS,
    repeats: int = 2000,
    arms: int = 5,
    seed: int = 0,
) -> SelfTest:
    """Coverage, family-wise error, how often the best group holds the truly best arm, and power."""
    rng = np.random.default_rng(seed)
    coverage, family, kept = {}, {}, {}
    for ratio in ratios:
        coverage[ratio] = _coverage(rng, seeds, items, ratio, repeats)
        family[ratio] = _family_error(rng, seeds, items, ratio, repeats, arms)
        kept[ratio] = _best_kept(rng, seeds, items, ratio, repeats, arms)
    power = _power(rng, seeds, items, repeats)
    return SelfTest(coverage, family, kept, power, seeds, items, repeats)


def draw(
    rng: np.random.Generator, means: Sequence[float], seeds: int, items: int, seed_sd: float, repeats: int
) -> tuple[Array, Array]:
    """Scores (repeat, arm, seed, item) of 0 and 1, and the true mean of each arm."""
    from scipy import stats

    arms, own_sd = len(means), 0.5
    shape = (repeats, arms, seeds, items)
    latent = np.asarray(means)[:, None, None] + rng.standard_normal(shape)
    latent += rng.standard_normal((repeats, 1, 1, items))
    latent += own_sd * rng.standard_normal((repeats, arms, 1, items))
    latent += seed_sd * rng.standard_normal((repeats, arms, seeds, 1))
    total = (2 + own_sd**2 + seed_sd**2) ** 0.5
    return (latent > 0).astype(np.float64), stats.norm.cdf(np.asarray(means) / total)


def seed_deviation(
    rng: np.random.Generator, means: Sequence[float], seeds: int, items: int, ratio: float
) -> float:
    """The latent deviation of seeds at which they bring `ratio` times the variance that items bring."""
    from scipy import optimize

    def measured(latent_sd: float) -> float:
        scores, _ = draw(np.random.default_rng(1), means[:2], 60, 400, latent_sd, 6)
        gap = scores[:, 0] - scores[:, 1]
        from_items = gap.mean(1).var(-1, ddof=1).mean() / items
        rest = gap - gap.mean(1, keepdims=True) - gap.mean(2, keepdims=True) + gap.mean((1, 2), keepdims=True)
        from_seeds = (gap.mean(2).var(-1, ddof=1).mean() - rest.var() / 400) / seeds
        return from_seeds / from_items - ratio

    return float(optimize.brentq(measured, 1e-3, 3.0, xtol=1e-2))


def _batches(repeats: int, size: int = 250) -> list[int]:
    return [min(size, repeats - start) for start in range(0, repeats, size)]


def _coverage(rng: np.random.Generator, seeds: int, items: int, ratio: float, repeats: int) -> float:
    means, held = (0.8, 1.0), 0
    deviation = seed_deviation(rng, means, seeds, items, ratio)
    for size in _batches(repeats):
        scores, truth = draw(rng, means, seeds, items, deviation, size)
        found = spread(scores[:, 0] - scores[:, 1])
        held += int((np.abs(found.estimate - (truth[0] - truth[1])) <= found.half_width(0.025)).sum())
    return held / repeats


def _family_error(
    rng: np.random.Generator, seeds: int, items: int, ratio: float, repeats: int, arms: int
) -> float:
    """How often equal arms, each against the first, give any Holm-corrected p of at most 0.05."""
    means, wrong = [1.0] * arms, 0
    deviation = seed_deviation(rng, means, seeds, items, ratio)
    for size in _batches(repeats):
        scores, _ = draw(rng, means, seeds, items, deviation, size)
        p = _two_sided(scores[:, 1:] - scores[:, :1])
        wrong += int(
            (p.min(1) * (arms - 1) <= 0.05).sum()
        )  # Holm rejects any iff Bonferroni rejects the least
    return wrong / repeats


def _best_kept(
    rng: np.random.Generator, seeds: int, items: int, ratio: float, repeats: int, arms: int
) -> float:
    """How often the truly best arm stays in the best group, where the others are as good but for a hair."""
    means = [1.0001] + [1.0] * (arms - 1)
    kept = 0
    deviation = seed_deviation(rng, means, seeds, items, ratio)
    for size in _batches(repeats):
        scores, _ = draw(rng, means, seeds, items, deviation, size)
        kept += int((best_group_p_of_array(scores)[:, 0] > 0.05).sum())
    return kept / repeats


def _power(rng: np.random.Generator, seeds: int, items: int, repeats: int) -> float:
    """How often a difference is found that is as large as the forecast says for these variances."""
    deviation = seed_deviation(rng, (1.0, 1.0), seeds, items, 0.3)
    scores, _ = draw(rng, (1.0, 1.0), seeds, items, deviation, 100)
    found = spread(scores[:, 0] - scores[:, 1])
    expected = Spread(
        0.0,
        float(found.from_seeds.mean()),
        float(found.from_items.mean()),
        float(found.shared.mean()),
        found.seed_df,
        found.item_df,
    )
    wanted = smallest_for(expected)
    from scipy import stats

    total = (2.25 + deviation**2) ** 0.5
    low = stats.norm.cdf(1.0 / total)
    means = (float(stats.norm.ppf(min(0.999, low + wanted)) * total), 1.0)
    hits = 0
    for size in _batches(repeats):
        scores, _ = draw(rng, means, seeds, items, deviation, size)
        hits += int((_two_sided(scores[:, 0] - scores[:, 1]) <= 0.05).sum())
    return hits / repeats


def _two_sided(gaps: Array) -> Array:
    upper = spread(gaps).p_greater()
    return 2 * np.minimum(upper, 1 - upper)
