"""Metrics that are no mean of item scores: equal to the library's own, and their parts to what leaving out does."""

from __future__ import annotations

import json

import numpy as np
import pytest

from veneer.comparing import from_results
from veneer.comparing.inference.cells import read_cell
from veneer.comparing.inference.corpus import KNOWN, METRICS, _parts_of, corpus_scores, parts, spearman_parts
from veneer.comparing.inference.scores import Scores
from veneer.tasks import metrics

RNG = np.random.default_rng(0)
WORDS = ["a", "cat", "dog", "sat", "on", "mat", "the", "ran"]
TAGS = ["O", "B-PER", "I-PER", "B-LOC"]


def classes(n=40):
    y = RNG.choice(["x", "y", "z"], n, p=[0.6, 0.3, 0.1])
    wrong = RNG.random(n) < 0.3
    return list(y), list(np.where(wrong, RNG.choice(["x", "y", "z"], n), y))


def sets(n=40):
    return ([[c for c in "abc" if RNG.random() < 0.5] for _ in range(n)] for _ in range(2))


def values(n=40):
    y = RNG.standard_normal(n)
    return list(y), list(np.round(y + RNG.standard_normal(n), 1))


def sentences(n=20):
    y = [" ".join(RNG.choice(WORDS, 8)) for _ in range(n)]
    return y, [
        " ".join(w if RNG.random() < 0.7 else str(RNG.choice(WORDS)) for w in line.split()) for line in y
    ]


def tagged(n=20):
    y = [list(RNG.choice(TAGS, 6)) for _ in range(n)]
    return y, [[t if RNG.random() < 0.7 else str(RNG.choice(TAGS)) for t in row] for row in y]


def likelihoods(n=20):
    tokens = RNG.integers(3, 30, n)
    return list(tokens), list(tokens * RNG.gamma(2.0, 0.5, n))


DATA = {
    "f1_macro": classes, "f1_micro": classes, "matthews": classes, "pearson": values, "spearman": values,
    "mean_squared_error": values, "mean_absolute_error": values, "token_accuracy": tagged, "entity_f1": tagged,
    "entity_precision": tagged, "entity_recall": tagged, "loss": likelihoods, "perplexity": likelihoods,
    "word_error_rate": sentences, "character_error_rate": sentences, "bleu": sentences, "chrf": sentences,
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_the_mean_of_the_parts_is_the_metric_and_a_part_is_what_leaving_out_changes(name):
    labels, predictions = DATA[name]()
    run = [{"label": y, "prediction": p} for y, p in zip(labels, predictions)]
    found = _parts_of(name, run)
    function = metrics.METRICS[name].function
    whole = function(labels, predictions)
    assert found.mean() == pytest.approx(whole, abs=1e-9)
    left = [
        function(labels[:i] + labels[i + 1 :], predictions[:i] + predictions[i + 1 :])
        for i in range(len(labels))
    ]
    expected = whole + (len(labels) - 1) * (np.mean(left) - np.array(left))
    assert found == pytest.approx(expected, abs=1e-6)
    assert found.std() > 0


def test_f1_of_several_labels_an_item_is_that_of_indicators():
    labels, predictions = sets()
    table = [[[int(c in row) for c in "abc"] for row in rows] for rows in (labels, predictions)]
    run = [{"label": y, "prediction": p} for y, p in zip(labels, predictions)]
    for name in ("f1_macro", "f1_micro"):
        assert _parts_of(name, run).mean() == pytest.approx(metrics.METRICS[name].function(*table), abs=1e-9)


def test_every_metric_of_the_library_is_a_mean_of_items_or_known_here():
    means = {"accuracy", "subset_accuracy", "exact_match", "word_f1", "log_loss"}
    assert {*metrics.METRICS} - {*KNOWN} - means == {"calibration_error"}
    assert {*METRICS} <= {*metrics.METRICS}


def test_the_parts_spread_as_the_metric_does_over_samples():
    """The standard error from the parts of one sample, against the deviation of the metric over many samples."""
    rng = np.random.default_rng(1)
    found, errors = [], []
    for _ in range(300):
        x = rng.standard_normal(200)
        mine = spearman_parts(x, 0.7 * x + rng.standard_normal(200))
        found.append(mine.mean())
        errors.append(mine.std(ddof=1) / 200**0.5)
    assert np.mean(errors) == pytest.approx(np.std(found, ddof=1), rel=0.12)


def test_rankings_are_scored_by_query():
    lines = []
    for query in ("q1", "q2", "q3"):
        for at in range(5):
            lines.append(
                {"item": f"{query}-{at}", "query": query, "label": float(at == 2), "prediction": RNG.normal()}
            )
    of = {"a": np.zeros((1, 15))}
    scores = Scores(of, {"a": (1,)}, tuple(line["item"] for line in lines))
    for name in ("ndcg_at_10", "mean_reciprocal_rank"):
        found = corpus_scores(name, scores, {"a": [lines]})
        y = [[line["label"] for line in lines if line["query"] == q] for q in ("q1", "q2", "q3")]
        p = [[line["prediction"] for line in lines if line["query"] == q] for q in ("q1", "q2", "q3")]
        assert found.items == ("q1", "q2", "q3")
        assert found.of["a"].mean() == pytest.approx(metrics.METRICS[name].function(y, p))


def test_where_predictions_were_not_kept_nothing_is_made_up():
    scores = Scores({"a": np.zeros((1, 2))}, {"a": (1,)}, ("1", "2"))
    lines = {"a": [[{"item": "1"}, {"item": "2"}]]}
    assert corpus_scores("f1_macro", scores, lines) is None
    assert corpus_scores("accuracy", scores, lines) is None


def test_a_mean_is_the_simplest_metric():
    items = RNG.standard_normal((3, 10))
    sums = np.stack([items, np.ones_like(items)], -1)
    assert parts(sums, METRICS["loss"].value) == pytest.approx(items)


def labelled(tmp_path, kind="class"):
    """A file of predictions of two arms, the second better, over the same items."""
    rng = np.random.default_rng(3)
    y = rng.choice(["no", "yes"], 90, p=[0.8, 0.2])
    lines = []
    for arm, wrong in (("lora", 0.25), ("full", 0.05)):
        for seed in range(4):
            flip = rng.random(90) < wrong
            for i in range(90):
                guess = {"yes": "no", "no": "yes"}[y[i]] if flip[i] else y[i]
                line = {"arm": arm, "seed": seed, "item": str(i), "label": y[i], "prediction": guess}
                lines.append({**line, "score": float(guess == y[i])})
    path = tmp_path / "theirs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path, lines


def test_a_comparison_by_f1_has_intervals_of_f1(tmp_path):
    path, lines = labelled(tmp_path)
    found = from_results(path, metric="f1_macro")
    summary = found.to_dict()
    assert summary["analysed"] == "f1_macro"
    by_hand = []
    for seed in range(4):
        mine = [line for line in lines if line["arm"] == "full" and line["seed"] == seed]
        by_hand.append(
            metrics.f1_macro([line["label"] for line in mine], [line["prediction"] for line in mine])
        )
    full = found.analysis.arm("full")
    assert full.interval.estimate == pytest.approx(np.mean(by_hand))
    assert full.seed_deviation == pytest.approx(np.std(by_hand, ddof=1))
    accuracy = from_results(path, metric="accuracy", output=tmp_path / "accuracy").analysis.arm("full")
    assert full.interval.standard_error > accuracy.interval.standard_error  # few items are of the rare class
    assert any("computed anew without each item" in note for note in summary["notes"])
    again = from_results(found.folder / "scores.jsonl", metric="f1_macro", output=tmp_path / "again")
    assert again.analysis.arm("full").interval == full.interval
    cell = read_cell(found.folder)
    assert cell.scores.of["full"].mean() == pytest.approx(np.mean(by_hand))


def test_an_error_that_is_better_lower_is_analysed_in_its_own_direction(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.standard_normal(60)
    lines = [
        {"arm": arm, "seed": s, "item": str(i), "label": y[i], "prediction": p, "score": -((p - y[i]) ** 2)}
        for arm, noise in (("good", 0.3), ("bad", 1.0))
        for s in range(3)
        for i, p in enumerate(y + noise * rng.standard_normal(60))
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    for metric in ("mean_absolute_error", "spearman"):
        found = from_results(path, metric=metric, output=tmp_path / metric)
        assert found.best == "good"
        summary = found.to_dict()
        assert summary["analysed"] == metric
        assert summary["higher_is_better"] == (metric == "spearman")
        best = next(arm for arm in summary["arms"] if arm["arm"] == "good")
        assert 0 < best["low"] < best["mean"] < best["high"] < 1.1


def test_a_metric_that_was_computed_in_another_way_keeps_the_item_scores(tmp_path):
    from types import SimpleNamespace

    from veneer.comparing.inference.corpus import of_records

    lines = [
        {"item": str(i), "score": 1.0, "label": "a", "prediction": "a" if i % 2 else "b"} for i in range(10)
    ]
    opened = {"items": lines, "metrics": {"f1_macro": 0.123}}

    class Named(SimpleNamespace):
        def __str__(self):
            return "lora"

    record = SimpleNamespace(arm=Named(is_trained=True), opened=[opened])
    scores = Scores({"lora": np.ones((1, 10))}, {"lora": (1,)}, tuple(map(str, range(10))))
    assert of_records("f1_macro", [record], scores) is None
    opened["metrics"]["f1_macro"] = metrics.f1_macro(
        [x["label"] for x in lines], [x["prediction"] for x in lines]
    )
    assert of_records("f1_macro", [record], scores).of["lora"].shape == (1, 10)
