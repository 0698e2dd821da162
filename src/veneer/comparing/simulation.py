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

from veneer.comparing.design import Assumed
from veneer.comparing.statistics import Array


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
