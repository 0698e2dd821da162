"""The hypervolume of a front: the area that can be counted by hand, what each arm adds, and how sure that is."""

import numpy as np
import pytest

from test_comparing_costs import made_scores
from veneer.comparing.measures.fronts import fronts
from veneer.comparing.measures.hypervolume import BEYOND, hypervolume


def exact(price, quality, worst=0.0):
    names = [f"arm{place}" for place in range(len(price))]
    price, quality = np.array(price, dtype=float), np.array(quality, dtype=float)
    drawn = np.repeat(quality[:, None], 10, 1)
    return hypervolume(names, quality, drawn, price, price[:, None], worst)


def test_the_area_is_what_one_counts_by_hand():
    """Prices 1, 10, 100 at 0, 1/2.2 and 2/2.2 of the range; gains 0.1, 0.3 and 0.4 above the reference."""
    found = exact([1, 10, 100], [0.6, 0.8, 0.9], worst=0.5)
    step = 1 / 2.2
    assert BEYOND == 0.1
    assert found["value"] == pytest.approx(0.1 * step + 0.3 * step + 0.4 * (1 - 2 * step))
    assert found["arms"]["arm0"]["adds"] == pytest.approx(0.1 * step)
    assert found["arms"]["arm1"]["adds"] == pytest.approx((0.3 - 0.1) * step)
    assert found["arms"]["arm2"]["adds"] == pytest.approx((0.4 - 0.3) * (1 - 2 * step))
    assert found["reference"]["price"] == pytest.approx(100**1.1)
    assert found["low"] == found["high"] == pytest.approx(found["value"])
    assert {one["probability"] for one in found["arms"].values()} == {1.0}


def test_the_area_equals_a_sum_over_many_budgets():
    """An independent way: walk over budgets, and take the best arm that each allows."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        price, quality = 10 ** rng.uniform(0, 4, 9), rng.uniform(0.2, 0.9, 9)
        low, high = np.log(price.min()), np.log(price.max())
        budgets = np.exp(np.linspace(low, low + 1.1 * (high - low), 20_001)[:-1])
        best = [max(0.0, (quality[price <= budget * (1 + 1e-12)] - 0.4).max()) for budget in budgets]
        assert exact(price, quality, 0.4)["value"] == pytest.approx(np.mean(best), abs=2e-4)


def test_an_arm_that_is_dominated_or_below_the_reference_adds_nothing():
    found = exact([1, 10, 10, 100], [0.6, 0.8, 0.7, 0.3], worst=0.5)["arms"]
    assert found["arm2"]["adds"] == found["arm3"]["adds"] == 0
    assert found["arm2"]["probability"] == found["arm3"]["probability"] == 0
    assert found["arm1"]["adds"] == pytest.approx(0.1 * 1.2 / 2.2)  # over the next best at its price


def test_one_of_two_equal_arms_can_be_spared():
    found = exact([1, 10, 10], [0.6, 0.8, 0.8], worst=0.5)
    assert found["arms"]["arm1"]["adds"] == found["arms"]["arm2"]["adds"] == 0
    assert found["value"] == pytest.approx((0.1 * 1.0 + 0.3 * 0.1) / 1.1)


def test_what_costs_nothing_stands_at_the_cheapest_price_and_no_range_has_no_area():
    assert exact([0, 1, 100], [0.5, 0.6, 0.9], 0.5)["reference"]["cheapest"] == 1
    assert exact([5, 5], [0.5, 0.6]) is None
    assert exact([0, 0], [0.5, 0.6]) is None


def test_the_order_and_the_names_of_arms_change_nothing():
    one = exact([1, 10, 100], [0.6, 0.8, 0.9], 0.5)
    two = exact([100, 1, 10], [0.9, 0.6, 0.8], 0.5)
    assert one["value"] == pytest.approx(two["value"])
    assert one["arms"]["arm0"]["adds"] == pytest.approx(two["arms"]["arm1"]["adds"])


def test_a_gain_within_the_noise_of_seeds_and_items_is_said_to_be_unsure():
    scores = made_scores(untrained=0.5, cheap=0.80, dear=0.805, good=0.95)
    price = {"untrained": 0, "cheap": 1, "dear": 10, "good": 100}
    found = fronts(scores, {arm: {"trainable_parameters": p} for arm, p in price.items()})
    area = found["trainable_parameters"]["hypervolume"]
    assert area["reference"]["quality"] == pytest.approx(scores.of["untrained"].mean())
    assert area["low"] < area["value"] < area["high"]
    assert area["arms"]["good"]["probability"] == area["arms"]["cheap"]["probability"] == 1.0
    assert 0.02 < area["arms"]["dear"]["probability"] < 0.98
    assert area["arms"]["untrained"]["adds"] == 0
