"""Metrics that are no mean of item scores: equal to the library's own, and their parts to what leaving out does."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from veneer.comparing.corpus import KNOWN, METRICS, _parts_of, corpus_scores, parts, spearman_parts
from veneer.comparing.scores import Scores
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
    assert found[-1] == pytest.approx(stats.spearmanr(x, x).statistic, abs=1)


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
