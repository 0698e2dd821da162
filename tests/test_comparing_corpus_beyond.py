"""Metrics that are no mean over items, beyond the test split's one number: each group and set has the metric itself."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from test_comparing_beyond import Wider
from test_comparing_fake import RATES, SIZES
from veneer.comparing import compare
from veneer.comparing.inference.corpus import Anew
from veneer.comparing.inference.scores import Scores
from veneer.tasks import metrics


class ByF1(Wider):
    """Computes F1 of every set, as a trainer does."""

    def __call__(self, **job):
        result = super().__call__(**job)
        for split, lines in result.predictions.items():
            labels, said = ([line[key] for line in lines] for key in ("label", "prediction"))
            result.metrics[split]["f1_macro"] = metrics.f1_macro(labels, said)
        return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("f1")
    options = {"rates": RATES, "budget": "demo", "sizes": SIZES, "progress": None, "seeds": 3}
    found = compare("m", "d", ["lora:rank=1"], output=folder, run_arm=ByF1(), metric="f1_macro", **options)
    return folder, found.to_dict()


def by_hand(folder, arm, items=None, further=None, seeds=(1, 2, 3)):
    """F1 of each seed, of some of the items, from what was sealed."""
    values = []
    for seed in seeds:
        sealed = json.loads((folder / "sealed" / arm / f"seed-{seed}.json").read_text())
        lines = sealed["further"][further]["items"] if further else sealed["items"]
        lines = [line for line in lines if items is None or items(line)]
        values.append(
            metrics.f1_macro([line["label"] for line in lines], [line["prediction"] for line in lines])
        )
    return values


def test_a_group_has_the_metric_of_its_items_and_not_their_mean_score(finished):
    folder, summary = finished
    assert summary["analysed"] == "f1_macro"
    rows = {row["group"]: row for row in summary["by_group"]["arms"]["full"]["groups"]}
    for name in ("many", "few"):
        mine = np.mean(by_hand(folder, "full", lambda line, name=name: line["group"] == name))
        assert rows[name]["mean"] == pytest.approx(mine)
        assert rows[name]["low"] < mine < rows[name]["high"]
    whole = np.mean(by_hand(folder, "full"))
    assert summary["by_group"]["arms"]["full"]["worst"] is None or rows["few"]["mean"] != pytest.approx(whole)


def test_further_sets_have_the_metric_and_drops_from_it(finished):
    folder, summary = finished
    test = np.mean(by_hand(folder, "full"))
    far = summary["shifted"]["shifted-far"]["arms"]["full"]
    assert far["mean"] == pytest.approx(np.mean(by_hand(folder, "full", further="shifted-far")))
    assert far["drop"]["difference"] == pytest.approx(test - far["mean"])
    for kind in ("noise", "blur"):
        name = f"corrupted-{kind}-3"
        arm = summary["corrupted"][name]["arms"]["full"]
        assert arm["mean"] == pytest.approx(np.mean(by_hand(folder, "full", further=name)))
        assert arm["drop"]["difference"] == pytest.approx(test - arm["mean"])
    assert "all" in summary["corrupted"]


def test_the_deviation_over_seeds_is_of_the_metric(finished):
    folder, summary = finished
    assert summary["stability"]["full"]["deviation"] == pytest.approx(
        np.std(by_hand(folder, "full"), ddof=1), rel=1e-6
    )


def test_the_note_says_what_groups_are_of_and_the_report_shows_them(finished):
    folder, summary = finished
    assert any("for each group and further set" in note for note in summary["notes"])
    assert "Who is served worst" in (folder / "report.html").read_text()


def ranked(queries):
    """A record whose items belong to `queries`, each with one relevant row."""
    from types import SimpleNamespace

    rng = np.random.default_rng(0)
    items = [
        {
            "item": str(i),
            "query": q,
            "label": float(i % 3 == 0),
            "prediction": float(rng.random()),
            "score": 0.0,
        }
        for i, q in enumerate(queries)
    ]
    record = SimpleNamespace(arm="a", opened=[{"items": items, "metrics": {}}])
    record.arm = SimpleNamespace(is_trained=True, __str__=lambda self: "a")
    return record, Scores(
        {str(record.arm): np.zeros((1, len(items)))}, {}, tuple(str(i) for i in range(len(items)))
    )


def test_a_ranking_in_several_groups_is_refused_and_one_in_each_is_not():
    record, scores = ranked([q for q in "pqrs" for _ in range(3)])
    scores = replace(scores, seeds=dict.fromkeys(scores.of, (0,)))
    anew = Anew("ndcg_at_10")
    apart = anew.by_group([record], scores, ["x"] * 6 + ["y"] * 6)
    assert apart is not None
    assert apart[0].items == ("p", "q", "r", "s")
    assert apart[1] == ["x", "x", "y", "y"]
    assert anew.by_group([record], scores, ["x", "y"] * 6) is None


def test_an_error_is_turned_so_that_higher_is_better():
    from types import SimpleNamespace

    items = [{"item": str(i), "label": float(i), "prediction": i + 1.0, "score": 0.0} for i in range(4)]
    record = SimpleNamespace(arm=SimpleNamespace(is_trained=True), opened=[{"items": items, "metrics": {}}])
    scores = Scores({str(record.arm): np.zeros((1, 4))}, {str(record.arm): (0,)}, ("0", "1", "2", "3"))
    found = Anew("mean_absolute_error").of([record], scores.only(["3", "1"]))
    assert found is not None
    assert found.items == ("3", "1")
    assert found.of[str(record.arm)].mean() == pytest.approx(-1.0)
