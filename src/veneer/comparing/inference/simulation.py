"""Scores whose truth is known, for trying the statistics on.

`draw` makes crossed scores of several arms from a latent normal: an item is easy or hard for all arms, a
little more so for one of them; a seed is lucky or not. Scores are the latent value, or whether it is above
zero; in both cases the true mean follows in closed form. `draw_pair` makes right-or-wrong scores of two arms
with exactly the variances that a forecast assumes, so that what it promises can be counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from veneer.comparing.inference.statistics import Array, spread
from veneer.comparing.planning.forecast import Assumed


@dataclass(frozen=True)
class Scenario:
    """One kind of scores.

    own: latent deviation of what is easy for one arm alone, beside 1 for an item and 1 for a single run; at 1
    half of an item's difference is the same for all seeds, as the forecast assumes.
    seed_scale: latent seed deviations of the arms, relative to each other (repeated over the arms).
    second_seeds: the second arm has this many seeds of its own, which it shares with no other.
    """

    name: str
    items: int = 300
    binary: bool = True
    own: float = 1.0
    seed_scale: tuple[float, ...] = (1.0,)
    second_seeds: int | None = None

    def scales(self, arms: int) -> Array:
        return np.array([self.seed_scale[place % len(self.seed_scale)] for place in range(arms)])


SCENARIOS = (
    Scenario("right or wrong"),
    Scenario("right or wrong, few items", items=100),
    Scenario("scores of any size", binary=False),
    Scenario("arms of unequal spread", seed_scale=(1.0, 2.0, 0.5)),
    Scenario("other seeds for one arm", second_seeds=5),
)


def draw(
    rng: np.random.Generator,
    scenario: Scenario,
    levels: Sequence[float],
    seeds: int,
    seed_sd: float,
    repeats: int,
) -> tuple[Array, Array]:
    """Scores (repeat, arm, seed, item), and the true mean of each arm.

    levels: how good each arm is, in deviations of its own latent score: equal levels are equal truths, also
    where the arms' seeds spread differently.
    """
    from scipy import stats

    arms, items = len(levels), scenario.items
    spread_of = seed_sd * scenario.scales(arms)
    total = np.sqrt(2 + scenario.own**2 + spread_of**2)
    middle = np.asarray(levels) * (total if scenario.binary else 1.0)
    latent = rng.standard_normal((repeats, arms, seeds, items))
    latent += rng.standard_normal((repeats, 1, 1, items))
    latent += scenario.own * rng.standard_normal((repeats, arms, 1, items))
    latent += (
        spread_of[:, None, None] * rng.standard_normal((repeats, arms, seeds, 1)) + middle[:, None, None]
    )
    if not scenario.binary:
        return latent, middle
    return (latent > 0).astype(np.float64), stats.norm.cdf(middle / total)


def seed_deviation(scenario: Scenario, seeds: int, ratio: float) -> float:
    """The latent deviation of seeds at which they bring `ratio` times the variance that items bring.

    To the mean difference of the first two arms, on the latent scale: (s1^2 + s2^2) / S over 2 own^2 / n.
    """
    first, second = scenario.scales(2)
    return float((ratio * seeds * 2 * scenario.own**2 / (scenario.items * (first**2 + second**2))) ** 0.5)


@dataclass(frozen=True)
class CorpusScenario:
    """Runs that are scored by a metric which is no mean of items. metric: f1_macro, matthews or pearson.

    An item has a label (one of two classes, the second on `rare` of the items; for pearson a number); an arm
    follows it as far as its level goes, and a seed is lucky or not. Items and arms are as in `Scenario`.
    """

    metric: str
    items: int = 300
    own: float = 1.0
    rare: float = 0.3

    @property
    def name(self) -> str:
        return f"{self.metric}, {self.items} items"

    @property
    def noise(self) -> float:
        return float((2 + self.own**2) ** 0.5)


CORPUS_SCENARIOS = (CorpusScenario("f1_macro"), CorpusScenario("matthews"), CorpusScenario("pearson"))


def draw_corpus(
    rng: np.random.Generator,
    scenario: CorpusScenario,
    levels: Sequence[float],
    seeds: int,
    seed_sd: float,
    repeats: int,
) -> Array:
    """The parts of the metric: (repeat, arm, seed, item)."""
    from veneer.comparing.inference.corpus import METRICS, counts, parts, products

    arms, items = len(levels), scenario.items
    if scenario.metric == "pearson":
        labels = rng.standard_normal((repeats, 1, 1, items))
    else:
        labels = np.where(rng.random((repeats, 1, 1, items)) < scenario.rare, 1.0, -1.0)
    luck = seed_sd * rng.standard_normal((repeats, arms, seeds, 1))
    guess = (np.asarray(levels)[:, None, None] + luck) * labels
    guess = guess + rng.standard_normal((repeats, 1, 1, items)) + rng.standard_normal(guess.shape)
    guess += scenario.own * rng.standard_normal((repeats, arms, 1, items))
    labels = np.broadcast_to(labels, guess.shape)
    if scenario.metric == "pearson":
        sums = products(labels, guess)
    else:
        sums = counts((labels > 0).astype(int), (guess > 0).astype(int), 2)
    return parts(sums, METRICS[scenario.metric].value)


def corpus_truth(scenario: CorpusScenario, level: float, seed_sd: float) -> float:
    """The mean of the metric over seeds, each on endless items: in closed form, then over the luck of seeds."""
    points, weights = np.polynomial.hermite_e.hermegauss(61)
    return float(corpus_value(scenario, level + seed_sd * points) @ weights / weights.sum())


def corpus_value(scenario: CorpusScenario, level: Array) -> Array:
    """The metric on endless items of arms with these levels."""
    from scipy import stats

    from veneer.comparing.inference.corpus import METRICS

    level = np.asarray(level, dtype=np.float64)
    if scenario.metric == "pearson":
        return level / np.sqrt(level**2 + scenario.noise**2)
    right = stats.norm.cdf(level / scenario.noise)
    shares = (1 - scenario.rare, scenario.rare)
    sums = []
    for own, other in (shares, shares[::-1]):
        sums += [own * right, own * right + other * (1 - right), np.full_like(right, own)]
    return METRICS[scenario.metric].value(1e6 * np.stack(sums, -1))


def corpus_seed_deviation(
    scenario: CorpusScenario, levels: tuple[float, float], seeds: int, ratio: float
) -> float:
    """The luck of seeds that brings `ratio` times the variance that items bring, to first order."""
    from dataclasses import replace

    large = replace(scenario, items=20_000)
    found = draw_corpus(np.random.default_rng(1), large, levels, 8, 0.0, 1)[0]
    gap = spread(found[0] - found[1])
    from_items = float(gap.from_items - gap.shared) * large.items / scenario.items
    slopes = [np.diff(corpus_value(scenario, np.array([at - 0.01, at + 0.01])))[0] / 0.02 for at in levels]
    return float((ratio * seeds * from_items / sum(slope**2 for slope in slopes)) ** 0.5)


def draw_pair(
    rng: np.random.Generator, assumed: Assumed, effect: float, seeds: int, items: int, repeats: int
) -> tuple[Array, Array]:
    """Right-or-wrong scores (repeat, seed, item) of two arms, `effect` apart, with the assumed variances.

    On a share m of the items the arms are in doubt. There each arm is right with a probability h or 1 - h,
    drawn for the item and kept by all seeds, so that the arms differ on m / 2 of the items, and a share
    (2 h - 1)^2 of that is the same for every seed. A seed shifts the probability of an arm on all of them.
    """
    doubtful = 2 * assumed.disagreement
    gain = assumed.persistent**0.5  # 2 h - 1
    shift = effect / (doubtful * gain)
    luck = assumed.seed_deviation / (doubtful * 2**0.5)
    if doubtful > 1 or shift > 0.5:
        raise ValueError(f"an effect of {effect} does not fit a disagreement of {assumed.disagreement}")
    open_items = rng.random((repeats, 1, items)) < doubtful
    others = rng.random((repeats, 1, items)) < 0.7  # right or wrong for both arms alike
    found = []
    for more in (shift, 0.0):
        often = rng.random((repeats, 1, items)) < 0.5 + more
        chance = np.where(often, (1 + gain) / 2, (1 - gain) / 2)
        chance = chance + luck * rng.standard_normal((repeats, seeds, 1))
        right = rng.random((repeats, seeds, items)) < chance
        found.append(np.where(open_items, right, others).astype(np.float64))
    return found[0], found[1]


def batches(repeats: int, size: int = 250) -> list[int]:
    """Sizes that sum to `repeats`, so that memory stays small."""
    return [min(size, repeats - start) for start in range(0, repeats, size)]
