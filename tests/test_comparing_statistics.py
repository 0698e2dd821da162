"""The statistics of comparing: by hand, against other libraries, on scores whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from veneer.comparing import analyse
from veneer.comparing.inference.analysis import Scores, best_group_p_of_array, front_probability
from veneer.comparing.inference.statistics import (
    adjust,
    crossed_interval,
    difference,
    sign_flip,
    sign_flip_can_decide,
    smallest_for,
    spread,
)


def made(means, seeds=6, items=200, seed=0, seed_sd=0.1):
    """Scores of 0 and 1 of some arms over the same items."""
    rng = np.random.default_rng(seed)
    item = rng.standard_normal(items)
    names = [f"arm{place}" for place in range(len(means))]
    of = {}
    for name, mean in zip(names, means):
        latent = mean + item + 0.5 * rng.standard_normal((seeds, items))
        latent += seed_sd * rng.standard_normal((seeds, 1))
        of[name] = (latent > 0).astype(float)
    return Scores(of, dict.fromkeys(names, tuple(range(seeds))), tuple(map(str, range(items))))


COSTS = {f"arm{i}": {"trainable_parameters": 100 * (i + 1), "step_seconds": 0.1} for i in range(6)}


def test_the_variance_components_by_hand():
    """Seed means 1, 3; item means 0, 2, 4; no residual: A = 2 / 2, B = 4 / 3, C = 0."""
    scores = np.array([[-1.0, 1.0, 3.0], [1.0, 3.0, 5.0]])
    found = spread(scores)
    assert float(found.estimate) == 2.0
    assert float(found.from_seeds) == pytest.approx(1.0)
    assert float(found.from_items) == pytest.approx(4 / 3)
    assert float(found.shared) == 0.0
    half = np.sqrt(stats.t.ppf(0.975, 2) ** 2 * 4 / 3 + stats.t.ppf(0.975, 1) ** 2 * 1.0)
    assert crossed_interval(scores).high == pytest.approx(2 + half)


def test_where_only_seeds_differ_the_test_is_the_t_test_over_seeds():
    seeds = np.array([0.1, 0.4, 0.2, 0.5, 0.3, 0.9])
    found = difference(np.repeat(seeds[:, None], 50, 1), np.zeros((6, 50)))
    assert found.p_value == pytest.approx(stats.ttest_1samp(seeds, 0).pvalue, rel=1e-6)


def test_where_only_items_differ_the_test_is_the_t_test_over_items():
    items = np.random.default_rng(0).standard_normal(80) + 0.2
    found = difference(np.repeat(items[None], 6, 0), np.zeros((6, 80)))
    assert found.p_value == pytest.approx(stats.ttest_1samp(items, 0).pvalue, rel=1e-6)
    one = difference(items[None], np.zeros((1, 80)))
    assert one.items_only
    assert one.p_value == pytest.approx(found.p_value, rel=1e-6)


def test_p_is_below_the_level_exactly_where_the_interval_leaves_out_zero():
    agreements = set()
    for seed in range(60):
        scores = made([1.0, 1.35], seed=seed)
        found = difference(scores.of["arm1"], scores.of["arm0"])
        excludes_zero = found.low > 0 or found.high < 0
        assert (found.p_value < 0.05) == excludes_zero
        agreements.add(excludes_zero)
    assert agreements == {True, False}


def test_the_other_way_round_is_the_same_difference():
    scores = made([0.5, 1.0])
    one, two = scores.of["arm0"], scores.of["arm1"]
    turned, direct = difference(one, two).reversed(), difference(two, one)
    for field in ("estimate", "low", "high", "p_value", "p_greater"):
        assert getattr(turned, field) == pytest.approx(getattr(direct, field), abs=1e-9)


def test_scores_that_are_all_right_keep_a_bound():
    found = crossed_interval(np.ones((6, 300)))
    assert found.high == 1.0
    assert found.low == pytest.approx(0.05 ** (1 / 300))
    assert difference(np.ones((6, 300)), np.ones((6, 300))).p_value == 1.0


def test_seeds_that_are_not_shared_add_their_variances():
    scores = made([1.0, 1.0], seed_sd=0.6)
    first, second = scores.of["arm0"], scores.of["arm1"][:4]
    apart = difference(first, second, same_seeds=False)
    assert apart.sign_flip_p is None
    assert apart.estimate == pytest.approx(first.mean() - second.mean())
    parts = first.mean(1).var(ddof=1) / 6 + second.mean(1).var(ddof=1) / 4
    assert float(apart.spread.from_seeds) == pytest.approx(parts)


def test_holm_by_hand_and_as_statsmodels_has_it():
    from statsmodels.stats.multitest import multipletests

    assert adjust([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjust([0.01, 0.04, 0.03], "fdr_bh") == pytest.approx([0.03, 0.04, 0.04])
    assert len(adjust([])) == 0
    many = np.random.default_rng(0).random((3, 9)) ** 3
    for how in ("holm", "fdr_bh"):
        expected = [multipletests(row, method=how)[1] for row in many]
        assert adjust(many, how) == pytest.approx(np.array(expected))


def test_the_sign_flip_test_is_exact_and_says_when_it_cannot_decide():
    assert sign_flip(np.array([1.0, 2.0, 3.0, 1.5, 2.5, 0.5])) == pytest.approx(2.0**-5)
    assert sign_flip(np.zeros(6)) == 1.0
    assert sign_flip_can_decide(6, 1)
    assert not sign_flip_can_decide(6, 2)
    assert sign_flip_can_decide(9, 12)
    assert not sign_flip_can_decide(9, 13)


def test_the_smallest_effect_is_found_four_times_in_five():
    from veneer.comparing.inference.selftest import _power

    assert 0.77 < _power(np.random.default_rng(1), 6, 0.05, 1, 600).value < 0.9
    few, many = (spread(made([1, 1], items=items).of["arm0"]) for items in (100, 1600))
    assert smallest_for(few) > 1.5 * smallest_for(many)
    assert smallest_for(few, contrasts=10) > smallest_for(few)


def test_the_best_group_holds_ties_and_leaves_out_what_is_worse():
    scores = made([0.0, 1.5, 1.5, 1.45])
    found = analyse(scores, COSTS)
    tied = {arm.arm for arm in found.arms if arm.tied_with_best}
    assert {"arm1", "arm2"} <= tied
    assert "arm0" not in tied
    assert found.recommended == "arm1"  # the cheapest of those that are tied
    assert found.arm("arm0").p_adjusted < 0.001
    assert found.arm(found.best).tied_with_best


def test_the_array_form_of_the_best_group_agrees_with_the_other():
    scores = made([0.9, 1.0, 1.4])
    names = sorted(scores.of)
    in_array = best_group_p_of_array(np.stack([scores.of[name] for name in names])[None])[0]
    found = analyse(scores, COSTS)
    for name, p in zip(names, in_array):
        assert found.arm(name).p_adjusted == pytest.approx(p, abs=1e-9)


def test_renaming_and_reordering_arms_changes_nothing():
    scores = made([0.5, 1.0, 1.2, 1.1])
    new = {"arm0": "z", "arm1": "y", "arm2": "b", "arm3": "a"}
    renamed = Scores(
        {new[name]: scores.of[name] for name in reversed(scores.of)},
        {new[name]: seeds for name, seeds in scores.seeds.items()},
        scores.items,
    )
    one, two = analyse(scores, COSTS), analyse(renamed, {new[n]: COSTS[n] for n in new})
    assert two.recommended == new[one.recommended]
    for arm in one.arms:
        other = two.arm(new[arm.arm])
        assert other.interval == arm.interval
        assert other.p_adjusted == pytest.approx(arm.p_adjusted, abs=1e-12)
        assert other.front_probability == arm.front_probability


def test_an_arm_that_is_worse_and_dearer_is_not_on_the_front():
    scores = made([1.0, 0.0, 2.0])
    found = front_probability(scores, list(scores.of), COSTS)
    assert found["arm0"] == 1.0  # the cheapest
    assert found["arm1"] < 0.01  # dearer than arm0, and worse
    assert found["arm2"] > 0.99  # the dearest, and the best
    free = front_probability(scores, list(scores.of), {**COSTS, "arm2": {}})
    assert free["arm2"] == 0.0  # its cost is not known


def test_groups_are_runs_of_arms_that_no_pair_of_which_is_separable():
    found = analyse(made([0.0, 0.05, 1.5, 1.55]), COSTS)
    assert {frozenset(group) for group in found.groups} == {
        frozenset({"arm0", "arm1"}),
        frozenset({"arm2", "arm3"}),
    }


def test_where_nothing_beats_the_untrained_base_the_conclusion_says_so():
    from veneer.comparing.reporting.words import Scale, conclusion

    scores = made([1.0, 1.0])
    names = {"arm0": "untrained", "arm1": "lora"}
    renamed = Scores(
        {names[n]: of for n, of in scores.of.items()}, dict.fromkeys(names.values(), (1,) * 6), scores.items
    )
    costs = {"untrained": {"trainable_parameters": 0}, "lora": {"trainable_parameters": 9}}
    said = conclusion(analyse(renamed, costs), Scale("accuracy", 1.0, True), costs, False)
    assert said.startswith("Nothing that was tried is shown to be better than the untrained base")


def test_planned_contrasts_are_corrected_for_their_own_number_alone():
    scores = made([0.5, 1.0, 1.2, 1.1])
    planned = analyse(scores, COSTS, [("arm1", "arm0")])
    assert planned.contrasts_are_planned
    assert [c.p_adjusted for c in planned.contrasts] == [planned.contrasts[0].difference.p_value]
    assert len(analyse(scores, COSTS).contrasts) == 3
