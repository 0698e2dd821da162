"""Successive halving: the same rungs for every arm, the winner of the full search where it must be, and less work."""

import json
from fractions import Fraction
from itertools import pairwise

import pytest

from test_comparing_fake import RATES, SIZES, FakeTrainer
from training_tiny import opened, saved_bert
from veneer.comparing import Comparison, compare, forecast, parse_budget
from veneer.comparing.planning.halving import best_rates, first_rung, last_rung, rungs
from veneer.comparing.planning.prepare import prepare
from veneer.comparing.run import run_prepared
from veneer.comparing.running.runner import default_runner
from veneer.errors import BadOption

MANY = dict.fromkeys(RATES, (0.003, 0.01, 0.03, 0.1, 0.3, 0.9, 2.7))


class Halved(FakeTrainer):
    """A trainer that takes a share of the budget. The order of its rates is the same with every share."""

    def __init__(self, **given):
        super().__init__(**given)
        self.spent = []

    def shared(self, share):
        return {}

    def __call__(self, *, share=1.0, **given):
        if "test" not in given["splits"]:
            self.spent.append((str(given["arm"]), given["learning_rate"], share))
        found = super().__call__(**given)
        if given["arm"].is_trained and given["learning_rate"]:
            value = 0.9 - abs(given["learning_rate"] - 0.3) / 10 - 0.1 * (1 - share)
            found.metrics["validation"]["accuracy"] = value
        return found


def compared(trainer, folder, **more):
    given = {
        "methods": "lora:rank=2,lora:rank=4",
        "rates": MANY,
        "trials": 7,
        "seeds": 2,
        "sizes": SIZES,
    } | more
    return compare(
        "fake", "fake", run_arm=trainer, output=folder, costs=False, progress=lambda event: None, controls="none",
        known_methods=["lora", "full", "linear_probe", "untrained"], **given,
    )  # fmt: skip


def test_the_rungs_follow_from_the_number_of_rates_and_end_at_half_the_budget():
    assert rungs(7) == [(7, 0.25), (3, 0.5)]
    assert rungs(3) == [(3, 0.5)]
    assert rungs(2) == [(2, 0.5)]
    assert rungs(1) == [(1, 1.0)]
    for count in range(2, 40):
        found = rungs(count)
        assert found[-1][1] == 0.5
        assert all(b == (a[0] // 2, 2 * a[1]) for a, b in pairwise(found))
        assert sum(Fraction(size) * Fraction(share) for size, share in found) <= Fraction(count, 2) + 1


def test_a_rate_that_diverged_is_never_kept_before_one_that_did_not():
    trials = [
        {"learning_rate": 0.1, "status": "diverged", "seed": 0},
        {"learning_rate": 0.1, "status": "ok", "validation": 0.99, "seed": 1},
        {"learning_rate": 0.2, "status": "ok", "validation": 0.2, "seed": 0},
        {"learning_rate": 0.3, "status": "ok", "validation": 0.2, "seed": 0},
    ]
    assert best_rates(trials, 3) == [0.2, 0.3, 0.1]
    assert best_rates(trials[2:], 1, higher_is_better=False) == [0.2]


def test_where_the_order_of_rates_does_not_depend_on_the_budget_the_full_search_has_the_same_winner(tmp_path):
    whole, part = Halved(), Halved()
    full = compared(whole, tmp_path / "full", extend_rates=0)
    half = compared(part, tmp_path / "half", extend_rates=0, halving=True)
    chosen = [{row["arm"]: row["learning_rate"] for row in result.rows} for result in (full, half)]
    assert chosen[0] == chosen[1]
    assert chosen[0]["lora:rank=2"] == 0.3
    assert {row["arm"]: row["value"] for row in full.rows} == {row["arm"]: row["value"] for row in half.rows}
    budgets = [
        {arm: sum(share for name, _, share in trainer.spent if name == arm) for arm, _, _ in trainer.spent}
        for trainer in (whole, part)
    ]
    assert set(budgets[0].values()) == {7.0}
    assert set(budgets[1].values()) == {7 / 4 + 3 / 2}  # the same for every arm
    assert full.design.sha256 != half.design.sha256
    assert "halving" not in full.design.to_dict()


def test_every_trial_is_published_with_its_share_and_the_report_says_how_rates_were_chosen(tmp_path):
    found = compared(Halved(), tmp_path, halving=True, extend_rates=1)
    trials = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    lora = [t for t in trials if t["arm"] == "lora:rank=2"]
    assert [t["share"] for t in lora] == [0.25] * 7 + [0.5] * 3
    assert {t["learning_rate"] for t in last_rung(lora)} == {0.1, 0.3, 0.03}
    assert len(first_rung(lora)) == 7
    assert [t["learning_rate"] for t in lora if t["chosen"]] == [0.3, 0.3]
    page = found.report.read_text()
    assert "halved from rung to rung" in page
    assert "slow to start" in page


def test_a_rate_beyond_the_edge_has_every_rung_that_the_others_had(tmp_path):
    trainer = Halved()
    edge = dict.fromkeys(RATES, (0.001, 0.003, 0.01, 0.03, 0.09))
    found = compared(trainer, tmp_path, halving=True, rates=edge, trials=5, extend_rates=1)
    lora = [(rate, share) for arm, rate, share in trainer.spent if arm == "lora:rank=4"]
    assert lora[:7] == [*((rate, 0.25) for rate in edge["lora"]), (0.09, 0.5), (0.03, 0.5)]
    assert lora[7:] == [(0.27, 0.25), (0.27, 0.5)]
    assert {row["learning_rate"] for row in found.rows if row["arm"] == "lora:rank=4"} == {0.27}


def test_a_halved_comparison_goes_on_where_it_was_stopped_and_runs_nothing_twice(tmp_path):
    first = Halved(stop_after=9)
    with pytest.raises(KeyboardInterrupt):
        compared(first, tmp_path, halving=True)
    second = Halved()
    found = compared(second, tmp_path, halving=True)
    assert not set(first.spent[:-1]) & set(second.spent)
    assert found.rows[0]["value"] is not None
    with pytest.raises(BadOption, match="halving"):
        compared(Halved(), tmp_path)


def test_a_trainer_that_cannot_take_a_share_is_told_so(tmp_path):
    with pytest.raises(BadOption, match="share of the budget"):
        compared(FakeTrainer(), tmp_path, halving=True)


def test_the_forecast_counts_shares_and_what_is_left_of_them():
    design = Comparison("m", "d", ("lora",), {"lora": MANY["lora"]}, halving=True)
    expected = forecast(design, seconds={"lora": 100.0})
    assert expected.tuning_runs == 10
    assert expected.seconds == pytest.approx(100 * (7 / 4 + 3 / 2 + 6))
    assert forecast(design, seconds={"lora": 100.0}, done={"lora": 16}).seconds == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_steps": 40}, {"max_steps": 10}),
        ({"max_steps": 1}, {"max_steps": 1}),
        ({"epochs": 2}, {"epochs": 0.5}),
        ({}, {"epochs": 0.5}),  # of the demo's two
        ({"max_seconds": 8.0}, {"max_seconds": 2.0}),
    ],
)
def test_a_share_of_the_budget_is_a_share_of_what_ends_training(options, expected, tmp_path):
    runner = default_runner(
        "nothing-is-opened", opened(16, 8, 8), task=None, budget=parse_budget("demo"), options=options
    )
    assert runner.shared(0.25) == expected
    assert runner.shared(1.0) == {}


def test_halved_trials_train_together_and_on_their_share_of_the_rows(tmp_path):
    base = saved_bert(tmp_path / "bert")
    prepared = prepare(
        base, opened(32, 16, 16), methods="lora:rank=2,ia3", seeds=(1, 2), trials=4, budget="demo", controls="none",
        halving=True, batch_size=8, device="cpu", base_dropout=False,
    )  # fmt: skip
    from veneer.comparing.running import together

    sizes = []
    real = together._cohort
    together._cohort = lambda runner, runs: (
        sizes.append([run.get("share", 1.0) for run in runs]) or real(runner, runs)
    )
    try:
        found = run_prepared(prepared, tmp_path / "out", costs=False, progress=lambda event: None)
    finally:
        together._cohort = real
    assert len(sizes[0]) >= 8  # the first rungs of several arms
    assert set(sizes[0]) == {0.25}
    assert any(
        one.count(0.5) > 1 for one in sizes
    )  # a later rung, of rates that the design alone does not name
    trials = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
    of_lora = [t["share"] for t in trials if t["arm"] == "lora:rank=2"]
    assert of_lora == [0.25] * 4 + [0.5] * 2
    assert {row["status"] for row in found.rows} == {"ok"}
