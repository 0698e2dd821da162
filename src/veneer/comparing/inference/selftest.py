"""A self-test of the statistics, which anybody can repeat: `veneer compare --self-test`.

On simulated scores whose truth is known it counts how often an interval holds the truth, how often arms that
are equal are called different, how often the truly best arm stays in the best group, and how often a
difference is found that the forecast calls findable. Bounds were fixed before anything was measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from veneer.comparing.inference.analysis import LEVEL, best_group_p_of_array
from veneer.comparing.inference.simulation import (
    CORPUS_SCENARIOS,
    SCENARIOS,
    CorpusScenario,
    Scenario,
    batches,
    corpus_seed_deviation,
    corpus_truth,
    draw,
    draw_corpus,
    draw_pair,
    seed_deviation,
)
from veneer.comparing.inference.statistics import (
    Array,
    adjust,
    sign_flip_can_decide,
    spread,
    spread_of_difference,
)
from veneer.comparing.planning.forecast import Assumed, smallest_findable

RATIOS = (0.1, 1.0, 10.0)
"""Variance of the mean difference that comes from seeds, over that which comes from items."""

BOUNDS = {
    "coverage of a difference": (0.93, 0.97),
    "coverage of a mean": (0.93, 0.97),
    "family error, all equal": (0.0, 0.05),
    "family error, some equal": (0.0, 0.05),
    "best arm kept": (0.95, 1.0),
    "power": (0.8, 1.0),
}

KEY = "~ outside its bound by less than two errors of the simulation; ! broken"

IntervalOf = Callable[[Array], tuple[Array, Array]]
"""(repeat, seed, item) differences -> lower and upper bounds (repeat,) of their mean, at 95 %."""


@dataclass(frozen=True)
class Measured:
    """One rate, counted over `repeats` simulated comparisons, and the bound that it has to keep."""

    scenario: str
    what: str
    ratio: float | None
    value: float
    repeats: int
    low: float
    high: float

    @property
    def error(self) -> float:
        """Standard error of the simulation."""
        inside = min(max(self.value, 1 / self.repeats), 1 - 1 / self.repeats)
        return float((inside * (1 - inside) / self.repeats) ** 0.5)

    @property
    def within(self) -> bool:
        return self.low <= self.value <= self.high

    @property
    def holds(self) -> bool:
        """False where the value is outside by more than two errors of the simulation."""
        return self.low - 2 * self.error <= self.value <= self.high + 2 * self.error

    @property
    def text(self) -> str:
        mark = " " if self.within else "~" if self.holds else "!"
        return f"{self.value:.3f}{mark}"


@dataclass(frozen=True)
class SelfTest:
    """All that was measured. `passed`: no bound is broken by more than the simulation's own error."""

    rows: tuple[Measured, ...]
    seeds: int
    arms: int
    repeats: int
    seconds: float

    @property
    def passed(self) -> bool:
        return all(row.holds for row in self.rows)

    @property
    def sign_flip_note(self) -> str:
        can = sum(sign_flip_can_decide(self.seeds, contrasts) for contrasts in range(1, 4097))
        most = f"at most {can} contrast{'s' if can != 1 else ''}" if can else "no contrast"
        return (
            f"A sign-flip test over {self.seeds} seeds cannot fall below {2.0 ** (1 - self.seeds):.3g}: "
            f"corrected, it can decide {most}."
        )

    def of(self, what: str) -> list[Measured]:
        return [row for row in self.rows if row.what == what]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        more = [{"error": row.error, "within": row.within, "holds": row.holds} for row in self.rows]
        return {
            **asdict(self),
            "rows": [{**asdict(row), **extra} for row, extra in zip(self.rows, more, strict=True)],
            "passed": self.passed,
            "sign_flip": self.sign_flip_note,
        }

    def __str__(self) -> str:
        lines = [
            f"{self.repeats} simulated comparisons behind each number, {self.seeds} seeds, {self.arms} arms, "
            f"{self.seconds:.0f} s",
            "columns: variance that seeds bring over variance that items bring",
        ]
        for what, (low, high) in BOUNDS.items():
            rows = self.of(what)
            if rows:
                bound = f"{low:g} to {high:g}" if 0 < low < high < 1 else f"at least {low:g}"
                bound = f"at most {high:g}" if low == 0 else bound
                error = max(row.error for row in rows)
                ratios = list(dict.fromkeys(row.ratio for row in rows))
                head = "".join(f"{'' if ratio is None else f'{ratio:g}':>9}" for ratio in ratios)
                lines += ["", f"{what}: {bound} (simulation: ± {error:.3f})"]
                lines += [f"{'':<35}{head}"] if head.strip() else []
            for scenario in dict.fromkeys(row.scenario for row in rows):
                cells = "".join(f"{row.text:>9}" for row in rows if row.scenario == scenario)
                lines.append(f"  {scenario:<33}{cells}")
        lines += ["", *([KEY] if any(not row.within for row in self.rows) else []), self.sign_flip_note]
        return "\n".join([*lines, "passed" if self.passed else "NOT PASSED"])


def self_test(
    seeds: int = 6,
    ratios: Sequence[float] = RATIOS,
    repeats: int = 4000,
    arms: int = 5,
    scenarios: Sequence[Scenario] = SCENARIOS,
    corpus: Sequence[CorpusScenario] = CORPUS_SCENARIOS,
    effect: float = 0.03,
    interval: IntervalOf | None = None,
    seed: int = 0,
) -> SelfTest:
    """Measure coverage, family-wise error, the best group and power, for each kind of scores and ratio.

    corpus: metrics that are no mean of item scores, whose coverage is measured too.
    effect: the difference whose power is measured, at the number of items for which the forecast names it.
    interval: one of your own instead of veneer's, to see whether it would pass; then coverage alone is
    measured. Every default run draws the same numbers.
    """
    start = time.monotonic()
    rows: list[Measured] = []
    for scenario in scenarios:
        for ratio in ratios:
            rng = np.random.default_rng([seed, len(rows)])
            deviation = seed_deviation(scenario, seeds, ratio)
            if interval is not None:
                found = _coverage_of(interval, rng, scenario, seeds, deviation, repeats)
            else:
                found = _equal(rng, scenario, seeds, deviation, repeats, arms)
                found |= _some_equal(rng, scenario, seeds, deviation, repeats, arms)
            rows += [_measured(scenario.name, what, ratio, value, repeats) for what, value in found.items()]
    for metric in corpus if interval is None else ():
        for ratio in ratios:
            rng = np.random.default_rng([seed, len(rows), 1])
            found = _corpus(rng, metric, seeds, ratio, repeats)
            rows += [_measured(metric.name, what, ratio, value, repeats) for what, value in found.items()]
    if interval is None:
        rows += [_power(np.random.default_rng([seed, 1]), seeds, effect, n, repeats) for n in (1, arms - 1)]
    rows.sort(key=lambda row: list(BOUNDS).index(row.what))
    return SelfTest(tuple(rows), seeds, arms, repeats, time.monotonic() - start)


def _measured(scenario: str, what: str, ratio: float | None, value: float, repeats: int) -> Measured:
    return Measured(scenario, what, ratio, float(value), repeats, *BOUNDS[what])


def _equal(
    rng: np.random.Generator, scenario: Scenario, seeds: int, deviation: float, repeats: int, arms: int
) -> dict[str, float]:
    """All arms are equally good, the hardest case for the family and for the best group alike."""
    covered = wrong = kept = 0
    for size in batches(repeats):
        scores, truth = draw(rng, scenario, [0.7] * arms, seeds, deviation, size)
        one = spread(scores[:, 0])
        covered += int((np.abs(one.estimate - truth[0]) <= one.half_width(LEVEL / 2)).sum())
        wrong += int((_corrected(scores, scenario).min(1) <= LEVEL).sum())
        kept += int((best_group_p_of_array(scores)[:, 0] > LEVEL).sum())
    found = {"coverage of a mean": covered / repeats, "family error, all equal": wrong / repeats}
    return found if scenario.second_seeds else found | {"best arm kept": kept / repeats}


def _some_equal(
    rng: np.random.Generator, scenario: Scenario, seeds: int, deviation: float, repeats: int, arms: int
) -> dict[str, float]:
    """Every second arm is as good as the first and the others are better: what Holm's later steps allow."""
    levels = [0.7 if place % 2 == 0 else 0.9 for place in range(arms)]
    equal = [place for place in range(1, arms) if place % 2 == 0]
    covered = wrong = 0
    for size in batches(repeats):
        scores, truth = draw(rng, scenario, levels, seeds, deviation, size)
        gap = _gap(scores, 1, scenario)
        covered += int((np.abs(gap.estimate - (truth[1] - truth[0])) <= gap.half_width(LEVEL / 2)).sum())
        corrected = _corrected(scores, scenario)[:, [place - 1 for place in equal]]
        wrong += int((corrected.min(1) <= LEVEL).sum())
    return {"coverage of a difference": covered / repeats, "family error, some equal": wrong / repeats}


def _gap(scores: Array, arm: int, scenario: Scenario) -> Any:
    """The spread of arm - first; the second arm may have seeds of its own."""
    own = scenario.second_seeds is not None and arm == 1
    second = scores[:, arm, : scenario.second_seeds] if own else scores[:, arm]
    return spread_of_difference(second, scores[:, 0], same_seeds=not own)


def _corrected(scores: Array, scenario: Scenario) -> Array:
    """Holm's p of every arm against the first: (repeat, arm, seed, item) -> (repeat, arm - 1)."""
    upper = np.stack([_gap(scores, arm, scenario).p_greater() for arm in range(1, scores.shape[1])], 1)
    return adjust(2 * np.minimum(upper, 1 - upper))


def _coverage_of(
    interval: IntervalOf,
    rng: np.random.Generator,
    scenario: Scenario,
    seeds: int,
    deviation: float,
    repeats: int,
) -> dict[str, float]:
    covered = 0
    for size in batches(repeats):
        scores, truth = draw(rng, scenario, (0.7, 0.9), seeds, deviation, size)
        low, high = interval(scores[:, 1] - scores[:, 0])
        true = truth[1] - truth[0]
        covered += int(((low <= true) & (true <= high)).sum())
    return {"coverage of a difference": covered / repeats}


def _corpus(
    rng: np.random.Generator, scenario: CorpusScenario, seeds: int, ratio: float, repeats: int
) -> dict[str, float]:
    """Coverage of a metric that is no mean of items, and of the difference of two arms in it."""
    levels = (1.2, 1.8)
    deviation = corpus_seed_deviation(scenario, levels, seeds, ratio)
    one, two = (corpus_truth(scenario, level, deviation) for level in levels)
    of_mean = of_gap = 0
    for size in batches(repeats):
        found = draw_corpus(rng, scenario, levels, seeds, deviation, size)
        mean, gap = spread(found[:, 0]), spread(found[:, 1] - found[:, 0])
        of_mean += int((np.abs(mean.estimate - one) <= mean.half_width(LEVEL / 2)).sum())
        of_gap += int((np.abs(gap.estimate - (two - one)) <= gap.half_width(LEVEL / 2)).sum())
    return {"coverage of a difference": of_gap / repeats, "coverage of a mean": of_mean / repeats}


def items_needed(effect: float, seeds: int, contrasts: int = 1, assumed: Assumed | None = None) -> int | None:
    """The fewest test items with which the forecast names `effect` findable; None where no number is enough."""
    enough = 100
    while smallest_findable(seeds, enough, contrasts, assumed) > effect:
        enough *= 2
        if enough > 10_000_000:
            return None
    low = enough // 2
    while enough - low > max(1, enough // 200):
        middle = (low + enough) // 2
        if smallest_findable(seeds, middle, contrasts, assumed) > effect:
            low = middle
        else:
            enough = middle
    return enough


def _power(rng: np.random.Generator, seeds: int, effect: float, contrasts: int, repeats: int) -> Measured:
    """How often an effect is found among `contrasts`, with the items and variances of the forecast.

    By Bonferroni's level, at which Holm finds a difference whatever the others are.
    """
    items = items_needed(effect, seeds, contrasts)
    name = f"{100 * effect:g} points, {items} items, {contrasts} contrast{'s' if contrasts > 1 else ''}"
    if items is None:
        return _measured(f"{name}: no number of items is enough", "power", None, 0.0, repeats)
    hits = 0
    for size in batches(repeats, 100):
        first, second = draw_pair(rng, Assumed(), effect, seeds, items, size)
        upper = spread(first - second).p_greater()
        hits += int((2 * np.minimum(upper, 1 - upper) * contrasts <= LEVEL).sum())
    return _measured(name, "power", None, hits / repeats, repeats)
