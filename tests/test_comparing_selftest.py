"""The self-test of the statistics: it holds its bounds, and it catches what is broken."""

from __future__ import annotations

import json

import numpy as np
import pytest

from veneer.comparing import self_test
from veneer.comparing.inference.selftest import BOUNDS, items_needed
from veneer.comparing.inference.simulation import (
    CORPUS_SCENARIOS,
    SCENARIOS,
    CorpusScenario,
    Scenario,
    corpus_truth,
    draw,
    draw_corpus,
    draw_pair,
    seed_deviation,
)
from veneer.comparing.inference.statistics import spread
from veneer.comparing.planning.forecast import Assumed


def nested_percentile_bootstrap(gaps, resamples=200):
    """Seeds drawn anew, and within each drawn seed its own items: what is often done, and is wrong."""
    rng = np.random.default_rng(0)
    seeds, items = gaps.shape[1:]
    weights = rng.multinomial(items, np.full(items, 1 / items), size=resamples * seeds) / items
    by_seed = np.einsum("rsi,wi->rsw", gaps, weights).reshape(len(gaps), seeds, resamples, seeds)
    chosen = rng.integers(seeds, size=(resamples, seeds))
    places = np.arange(resamples)[:, None], np.arange(seeds)
    means = by_seed[:, chosen, places[0], places[1]].mean(-1)
    return tuple(np.quantile(means, (0.025, 0.975), axis=-1))


def test_a_nested_percentile_bootstrap_over_six_seeds_is_caught():
    found = self_test(repeats=300, scenarios=SCENARIOS[:1], interval=nested_percentile_bootstrap)
    assert not found.passed
    assert any(row.value < 0.9 for row in found.rows)
    assert "!" in str(found)
    assert "NOT PASSED" in str(found)


def test_the_interval_of_the_library_passes_where_the_broken_one_is_caught():
    def crossed(gaps):
        found = spread(gaps)
        half = found.half_width(0.025)
        return found.estimate - half, found.estimate + half

    assert self_test(repeats=300, scenarios=SCENARIOS[:1], interval=crossed).passed


def test_an_interval_that_is_far_too_wide_is_caught_too():
    found = self_test(
        repeats=300,
        scenarios=SCENARIOS[:1],
        interval=lambda gaps: (np.full(len(gaps), -1.0), np.full(len(gaps), 1.0)),
    )
    assert not found.passed


def test_a_small_self_test_measures_every_rate_and_prints_it():
    few = (Scenario("few", items=60), Scenario("others", items=60, binary=False, second_seeds=4))
    found = self_test(repeats=120, ratios=(1.0,), arms=3, scenarios=few, corpus=(), effect=0.05)
    assert {row.what for row in found.rows} == set(BOUNDS)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["passed"] == found.passed
    assert plain["rows"][0]["error"] == pytest.approx(found.rows[0].error)
    text = str(found)
    assert all(what in text for what in BOUNDS)
    assert "can decide at most 1 contrast" in text
    assert max(map(len, text.split("\n"))) <= 100


def test_the_same_call_measures_the_same():
    one, two = (
        self_test(repeats=60, ratios=(1.0,), arms=3, scenarios=SCENARIOS[:1], corpus=()) for _ in range(2)
    )
    assert one.rows == two.rows
    assert (
        self_test(repeats=60, ratios=(1.0,), arms=3, scenarios=SCENARIOS[:1], corpus=(), seed=1).rows
        != one.rows
    )


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_the_truth_of_simulated_scores_is_their_mean(scenario):
    deviation = seed_deviation(scenario, 6, 1.0)
    scores, truth = draw(np.random.default_rng(0), scenario, (0.7, 0.9, 0.7), 6, deviation, 400)
    means = scores.mean((2, 3))
    error = means.std(0, ddof=1) / 400**0.5
    assert (np.abs(means.mean(0) - truth) < 4 * error).all()
    if scenario.binary:
        assert truth[0] == pytest.approx(truth[2])  # equal levels are equal truths, whatever the spread
    assert truth[1] > truth[0]


@pytest.mark.parametrize("scenario", CORPUS_SCENARIOS, ids=lambda scenario: scenario.metric)
def test_the_truth_of_a_simulated_metric_is_its_mean_over_seeds(scenario):
    levels = (1.2, 1.8)
    means = draw_corpus(np.random.default_rng(0), scenario, levels, 6, 0.3, 200).mean((2, 3))
    for place, level in enumerate(levels):
        error = means[:, place].std(ddof=1) / 200**0.5
        assert abs(means[:, place].mean() - corpus_truth(scenario, level, 0.3)) < 4 * error


def test_the_coverage_of_a_metric_that_is_no_mean_is_measured_too():
    found = self_test(
        repeats=250, ratios=(1.0,), arms=3, scenarios=(), corpus=(CorpusScenario("f1_macro", 100),)
    )
    (of_gap,) = found.of("coverage of a difference")
    assert of_gap.holds
    assert "f1_macro, 100 items" in str(found)


def test_simulated_pairs_have_the_variances_that_were_assumed():
    assumed = Assumed(seed_deviation=0.02, disagreement=0.15, persistent=0.4)
    first, second = draw_pair(np.random.default_rng(0), assumed, 0.0, 40, 500, 60)
    gap = first - second
    assert np.abs(gap).mean() == pytest.approx(0.15, rel=0.05)
    found = spread(gap)
    rest = float(found.shared.mean())
    assert float(found.from_items.mean()) - rest == pytest.approx(0.15 * 0.4 / 500, rel=0.05)
    assert float(found.from_seeds.mean()) - rest == pytest.approx(0.02**2 / 40, rel=0.15)
    moved, still = draw_pair(np.random.default_rng(0), assumed, 0.05, 10, 500, 400)
    assert (moved - still).mean() == pytest.approx(0.05, abs=0.003)


def test_an_effect_that_no_number_of_items_shows_has_no_size():
    assert items_needed(0.005, 6) is None  # seeds that differ by a point hide half a point
    assert 600 < items_needed(0.03, 6) < 800


@pytest.mark.slow
def test_coverage_error_power_and_the_best_group_keep_their_bounds_at_six_seeds():
    found = self_test()
    print(found)
    broken = [row for row in found.of("coverage of a difference") if not row.within]
    assert not broken
    assert found.passed


@pytest.mark.slow
def test_twelve_arms_keep_their_bounds_too():
    found = self_test(repeats=2000, arms=12, scenarios=SCENARIOS[:1], corpus=(), seed=1)
    print(found)
    assert found.passed
