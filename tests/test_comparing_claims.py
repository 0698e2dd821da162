"""Claims are decided by their rule: each verdict from scores that call for it, and nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from veneer.comparing import decide
from veneer.comparing.inference.cells import Cell
from veneer.comparing.inference.claims import RULES, check_claim
from veneer.comparing.inference.equivalence import equivalence, orders, slope_of_deviation, variance_share
from veneer.comparing.inference.scores import Scores
from veneer.comparing.inference.statistics import difference
from veneer.errors import BadOption, UnknownName, UnknownOption


def made(means, seeds=6, items=400, seed_sd=0.003, noise=0.1, seed=0):
    """Scores of arms with these means."""
    rng = np.random.default_rng(seed)
    item = 0.2 * rng.standard_normal(items)
    of = {
        arm: mean
        + item
        + noise * rng.standard_normal((seeds, items))
        + seed_sd * rng.standard_normal((seeds, 1))
        for arm, mean in means.items()
    }
    return Scores(of, dict.fromkeys(of, tuple(range(seeds))), tuple(map(str, range(items))))


def cell(scores, claim, folder, parameters=None):
    arms = [{"arm": arm, "trainable_parameters": (parameters or {}).get(arm)} for arm in scores.of]
    summary = {
        "comparison": {"claim": claim, "data": "d", "model": "m", "higher_is_better": True},
        "arms": arms,
    }
    return Cell(folder, summary, scores)


def verdict(scores, claim, folder, **more):
    return decide(cell(scores, {"id": "X", "says": "so", **claim}, folder, **more))


EQUAL = {"rule": "equivalent", "anchor": "lora", "margin": 0.02}


@pytest.mark.parametrize(
    ("means", "noise", "expected"),
    [
        ({"lora": 0.8, "dora": 0.803, "pissa": 0.798}, 0.1, "agrees"),
        ({"lora": 0.8, "dora": 0.86, "pissa": 0.8}, 0.1, "contradicts"),
        ({"lora": 0.8, "dora": 0.8, "pissa": 0.8}, 3.0, "cannot tell"),
        ({"lora": 0.8, "dora": 0.819, "pissa": 0.8}, 0.1, "cannot tell"),
    ],
)
def test_equality_within_a_margin(means, noise, expected, tmp_path):
    found = verdict(made(means, noise=noise), EQUAL, tmp_path)
    assert found.verdict == expected
    assert set(found.numbers) == {"dora", "pissa"}


def test_two_one_sided_tests_agree_with_the_interval_at_ninety_per_cent():
    for margin in (0.005, 0.01, 0.02, 0.03):
        for seed in range(10):
            scores = made({"a": 0.8, "b": 0.808}, seed=seed)
            gap = difference(scores.of["b"], scores.of["a"], confidence=0.90)
            inside = -margin < gap.low and gap.high < margin
            assert (equivalence(gap, margin).p_equal < 0.05) == inside


def test_unequal_arms_are_called_equal_in_one_case_of_twenty():
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(400):
        scores = made({"a": 0.8, "b": 0.82}, seed=int(rng.integers(1 << 30)), items=200)
        wrong += equivalence(difference(scores.of["b"], scores.of["a"]), 0.02).p_equal <= 0.05
    assert wrong / 400 <= 0.075


def test_where_only_seeds_differ_it_is_the_test_of_statsmodels():
    from statsmodels.stats.weightstats import ttost_paired

    seeds = np.array([0.010, 0.004, -0.003, 0.006, 0.001, 0.008])
    found = equivalence(difference(np.repeat(seeds[:, None], 30, 1), np.zeros((6, 30))), 0.02)
    assert found.p_equal == pytest.approx(ttost_paired(seeds, np.zeros(6), -0.02, 0.02)[0], rel=1e-4)


@pytest.mark.parametrize(
    ("short", "long", "expected"),
    [(0.05, -0.05, "agrees"), (0.05, 0.05, "contradicts"), (0.05, 0.0, "cannot tell")],
)
def test_both_signs(short, long, expected, tmp_path):
    from veneer.comparing.inference.claims import RULES

    claim = {"first": "loreft", "second": "lora", "signs": ["+", "-"]}
    cells = [
        cell(made({"lora": 0.7, "loreft": 0.7 + gain}, seed_sd=0.01), claim, tmp_path / str(gain))
        for gain in (short, long)
    ]
    assert RULES["signs"].decide(claim, cells)[0] == expected


def test_an_order_is_another_only_where_a_pair_is_surely_reversed():
    one = made({"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6})
    alike = orders(one, made({"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}, seed=1))
    assert alike.tau == 1.0
    assert alike.low == 1.0
    assert not alike.reversed_pairs
    other = orders(one, made({"a": 0.6, "b": 0.8, "c": 0.7, "d": 0.9}, seed=1))
    assert ("a", "d") in other.reversed_pairs
    order = [list("abcd").index(x) for x in "abcd"]
    assert other.tau == pytest.approx(stats.kendalltau([4, 3, 2, 1], [1, 3, 2, 4]).statistic)
    assert order
    ties = orders(made(dict.fromkeys("abcd", 0.8)), made(dict.fromkeys("abcd", 0.8), seed=5))
    assert not ties.reversed_pairs  # orders of luck are no reversal


def test_the_other_comparison_of_an_order_stands_beside_the_first(tmp_path):
    claim = {"id": "C8", "says": "s", "rule": "reordered", "with": ["shared"]}
    found = decide(cell(made({"a": 0.9, "b": 0.8}), claim, tmp_path / "tuned"))
    assert found.verdict == "cannot tell"
    assert "shared" in found.because


def test_shares_of_variance_by_hand():
    """Two arms 2 apart, rates without effect, residuals +-1: cells explain 12 of 24 + error."""
    values = np.zeros((2, 2, 4)) + np.array([0.0, 2.0])[:, None, None] + np.array([1, -1, 1, -1])
    found = variance_share(values, ("arm", "rate"))
    error = 16 / 12
    assert found.of["arm"] == pytest.approx((16 - error) / (32 + error))
    assert found.of["rate"] == 0.0
    assert found.low < found.share < found.high


def test_the_interval_of_a_share_holds_the_truth():
    rng = np.random.default_rng(0)
    effect = rng.standard_normal((2, 5))
    effect -= effect.mean()
    truth = (effect**2).mean() / ((effect**2).mean() + 1)
    held = 0
    for _ in range(300):
        found = variance_share(effect[..., None] + rng.standard_normal((2, 5, 3)))
        held += found.low <= truth <= found.high
    assert 0.92 <= held / 300 <= 0.98


def write_trials(folder, spread_of_rates, noise):
    rng = np.random.default_rng(0)
    lines = []
    for arm in ("p:init=random", "p:init=vocabulary"):
        for at, rate in enumerate((0.001, 0.01, 0.1, 0.3, 1.0)):
            for seed in (0, 1, 2):
                value = 0.6 + spread_of_rates * at + 0.02 * (arm[-1] == "y") + noise * rng.standard_normal()
                line = {"arm": arm, "learning_rate": rate, "seed": seed, "status": "ok", "validation": value}
                lines.append(line)
    lines[0] |= {"status": "diverged", "validation": None}
    (folder / "trials.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


@pytest.mark.parametrize(
    ("rates", "noise", "expected"),
    [(0.05, 0.005, "agrees"), (0.0, 0.2, "contradicts"), (0.04, 0.05, "cannot tell")],
)
def test_the_share_that_rates_and_starts_explain(rates, noise, expected, tmp_path):
    write_trials(tmp_path, rates, noise)
    scores = made({"p:init=random": 0.7, "p:init=vocabulary": 0.7})
    found = verdict(scores, {"rule": "variance", "share": 0.6}, tmp_path)
    assert found.verdict == expected, found


def test_trials_that_are_not_complete_cannot_tell(tmp_path):
    found = verdict(made({"a": 0.7, "b": 0.7}), {"rule": "variance"}, tmp_path)
    assert found.verdict == "cannot tell"
    assert "0 learning rates" in found.because


@pytest.mark.parametrize(
    ("power", "expected"), [(0.5, "agrees"), (-0.5, "contradicts"), (0.0, "cannot tell")]
)
def test_the_deviation_over_seeds_against_parameters(power, expected, tmp_path):
    parameters = {f"lora:rank={rank}": 1000 * rank for rank in (1, 4, 16, 64, 256)}
    rng = np.random.default_rng(1)
    seeds = rng.standard_normal(8)
    of = {
        arm: np.repeat(0.7 + 0.01 * (size / 1000) ** power * seeds[:, None], 50, 1)
        for arm, size in parameters.items()
    }
    if power == 0.0:
        of = {arm: scores + 0.01 * rng.standard_normal((8, 1)) for arm, scores in of.items()}
    scores = Scores(of, dict.fromkeys(of, tuple(range(8))), tuple(map(str, range(50))))
    found = verdict(scores, {"rule": "slope"}, tmp_path, parameters=parameters)
    assert found.verdict == expected, found


def test_the_interval_of_the_slope_holds_the_truth():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        deviations = rng.standard_normal((5, 8)).std(1, ddof=1)
        found = slope_of_deviation(deviations, 10.0 ** np.arange(5), 8)
        held += found.low <= 0 <= found.high
    assert held / 400 >= 0.94


def test_a_claim_is_checked_before_anything_runs():
    with pytest.raises(UnknownName, match="no rule of a claim is called 'equal'"):
        check_claim({"rule": "equal"})
    with pytest.raises(UnknownOption, match="no field 'margins'"):
        check_claim({"rule": "equivalent", "margins": 0.02})
    with pytest.raises(BadOption, match="needs 'margin'"):
        check_claim({"rule": "equivalent"})
    with pytest.raises(UnknownName, match="names 'dorra'"):
        check_claim({**EQUAL, "arms": ["dorra"]}, ["lora", "dora"])
    check_claim({**EQUAL, "arms": ["dora:rank=2,alpha=4"]}, ["lora", "dora:alpha=4,rank=2"])
    assert all(rule.meaning for rule in RULES.values())


def test_a_comparison_without_a_claim_says_so(tmp_path):
    with pytest.raises(BadOption, match="has no claim"):
        decide(cell(made({"a": 0.1, "b": 0.2}), {}, tmp_path))


def test_a_comparison_with_a_claim_publishes_its_verdict(tmp_path):
    from typer.testing import CliRunner

    from test_comparing_fake import RATES, FakeTrainer
    from veneer.cli._app import app
    from veneer.comparing import compare

    claim = {"id": "T1", "says": "rank 2 is as good as rank 1", "rule": "equivalent", "anchor": "lora:rank=1",
             "arms": ["lora:rank=2"], "margin": 0.5}  # fmt: skip
    found = compare(
        methods=["lora:rank=1", "lora:rank=2"], output=tmp_path / "c", run_arm=FakeTrainer(), rates=RATES,
        claim=claim, trials=3, progress=None,
    )  # fmt: skip
    (said,) = found.to_dict()["claims"]
    assert said["verdict"] == "agrees"
    done = CliRunner().invoke(app, ["compare", "--decide", str(tmp_path / "c")])
    assert done.exit_code == 0, done.output
    assert "agrees: all 1 arms are within 0.5 of lora:rank=1" in done.stdout
    assert json.loads((tmp_path / "c" / "claim.json").read_text())["verdict"] == "agrees"
