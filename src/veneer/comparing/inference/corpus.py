"""Metrics that are no mean of item scores: F1, Matthews, BLEU, chrF, error rates, perplexity, correlations, nDCG.

Such a metric is a function of sums over items (counts, n-gram matches, products). It is computed anew without each
item in turn, from the sums less those of that item; what changes is that item's part in the metric:

    part_i = m + (n - 1) (mean_j m_(-j) - m_(-i))        mean over i: m

the pseudo-values of the jackknife (Tukey, 1958; Efron and Stein, 1981), moved so that their mean is the metric. To
first order the metric is the mean of its parts, so that seeds, items, pairs and corrections are treated as those of
any other score. `selftest` measures the coverage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from veneer.comparing.inference.scores import Scores
from veneer.comparing.inference.statistics import Array

if TYPE_CHECKING:
    from veneer.comparing.publishing.records import Record

SumsOf = Callable[[Sequence[Any], Sequence[Any]], Array]
"""(labels, predictions) of n items -> what is summed: (n, k)."""
ValueOf = Callable[[Array], Array]
"""Sums (..., k) -> the metric (...)."""


@dataclass(frozen=True)
class Corpus:
    """A metric by its sums. `sums` is given all labels and predictions of a run, in the order of its items."""

    sums: SumsOf
    value: ValueOf


def parts(statistics: Array, value: ValueOf) -> Array:
    """(..., item, k) -> (..., item): what each item does to the metric; their mean is the metric."""
    items = statistics.shape[-2]
    total = statistics.sum(-2, keepdims=True)
    without = value(total - statistics)
    return value(total) + (items - 1) * (without.mean(-1, keepdims=True) - without)


# -- what is summed, and the metric of the sums ------------------------------------------------------


def ratio(sums: Array) -> Array:
    """Of two sums."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-12)


def f1(sums: Array) -> Array:
    """F1 from (hits, predicted, true) of one class, or of all decisions together."""
    return 2 * sums[..., 0] / np.maximum(sums[..., 1] + sums[..., 2], 1e-12)


def f1_macro(sums: Array) -> Array:
    """The mean of F1 over the classes that occur, from (hits, predicted, true) of each: (..., 3 classes)."""
    by_class = sums.reshape(*sums.shape[:-1], -1, 3)
    occurs = by_class[..., 1] + by_class[..., 2] > 0.5
    return (f1(by_class) * occurs).sum(-1) / np.maximum(occurs.sum(-1), 1)


def matthews(sums: Array) -> Array:
    """Matthews' correlation of several classes (Gorodkin, 2004), from (hits, predicted, true) of each."""
    by_class = sums.reshape(*sums.shape[:-1], -1, 3)
    predicted, true = by_class[..., 1], by_class[..., 2]
    right, total = by_class[..., 0].sum(-1), true.sum(-1)
    spreads = (total**2 - (predicted**2).sum(-1)) * (total**2 - (true**2).sum(-1))
    return (right * total - (predicted * true).sum(-1)) / np.sqrt(np.maximum(spreads, 1e-12))


def pearson(sums: Array) -> Array:
    """Linear correlation from the sums of x, y, xx, yy, xy, 1; 0 where one side is constant."""
    x, y, xx, yy, xy, n = np.moveaxis(sums, -1, 0)
    spreads = (n * xx - x**2) * (n * yy - y**2)
    return np.where(spreads > 1e-12, (n * xy - x * y) / np.sqrt(np.maximum(spreads, 1e-12)), 0.0)


def products(x: Array, y: Array) -> Array:
    """What `pearson` sums: (..., item) twice -> (..., item, 6). Centred first, which keeps digits."""
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    return np.stack([x, y, x * x, y * y, x * y, np.ones_like(x)], -1)


def counts(labels: Array, predictions: Array, classes: int) -> Array:
    """(hit, predicted, true) of each class: whole numbers (..., item) twice -> (..., item, 3 classes)."""
    true = labels[..., None] == np.arange(classes)
    predicted = predictions[..., None] == np.arange(classes)
    found = np.stack([true & predicted, predicted, np.broadcast_to(true, predicted.shape)], -1)
    return found.reshape(*found.shape[:-2], -1).astype(np.float64)


def _class_counts(labels: Sequence[Any], predictions: Sequence[Any]) -> Array:
    if isinstance(labels[0], list):  # several labels an item: each is a decision of its own
        names = sorted({str(name) for row in (*labels, *predictions) for name in row})
        sets = [[{str(n) for n in row} for row in rows] for rows in (labels, predictions)]
        true, guessed = (np.array([[name in row for name in names] for row in rows]) for rows in sets)
        return np.stack([true & guessed, guessed, true], -1).reshape(len(labels), -1).astype(np.float64)
    names = sorted({str(name) for name in (*labels, *predictions)})
    place = {name: number for number, name in enumerate(names)}
    y, guessed = (np.array([place[str(name)] for name in rows]) for rows in (labels, predictions))
    return counts(y, guessed, len(names))


def _all_counts(labels: Sequence[Any], predictions: Sequence[Any]) -> Array:
    return _class_counts(labels, predictions).reshape(len(labels), -1, 3).sum(1)


def _numbers(labels: Sequence[Any], predictions: Sequence[Any]) -> tuple[Array, Array]:
    return np.array([float(y) for y in labels]), np.array([float(p) for p in predictions])


def _errors(power: int) -> SumsOf:
    def sums(labels: Sequence[Any], predictions: Sequence[Any]) -> Array:
        y, guessed = _numbers(labels, predictions)
        return np.stack([np.abs(guessed - y) ** power, np.ones_like(y)], -1)

    return sums


def _likelihoods(labels: Sequence[Any], predictions: Sequence[Any]) -> Array:
    tokens, losses = _numbers(labels, predictions)
    return np.stack([losses, tokens], -1)


def _tags(labels: Sequence[Any], predictions: Sequence[Any]) -> Array:
    pairs = zip(labels, predictions, strict=True)
    return np.array([[sum(a == b for a, b in zip(y, p)), min(len(y), len(p))] for y, p in pairs], dtype=float)


def _entities(labels: Sequence[Any], predictions: Sequence[Any]) -> Array:
    from seqeval.metrics.sequence_labeling import get_entities

    found = []
    for y, p in zip(labels, predictions, strict=True):
        true, guessed = set(get_entities(list(y))), set(get_entities(list(p)))
        found.append([len(true & guessed), len(guessed), len(true)])
    return np.array(found, dtype=float)


def _edits(by_word: bool) -> SumsOf:
    def sums(labels: Sequence[Any], predictions: Sequence[Any]) -> Array:
        from veneer.tasks._seq2seq import plain_words
        from veneer.tasks.metrics import edits

        found = []
        for y, p in zip(labels, predictions, strict=True):
            true, guessed = plain_words(str(y)), plain_words(str(p))
            pair = (true.split(), guessed.split()) if by_word else (true, guessed)
            found.append([edits(*pair), len(pair[0])])
        return np.array(found, dtype=float)

    return sums


def _translation(name: str) -> Corpus:
    """sacrebleu's own sums of a sentence, and its own score of sums."""

    def metric() -> Any:
        import sacrebleu

        return getattr(sacrebleu, name)()

    def sums(labels: Sequence[Any], predictions: Sequence[Any]) -> Array:
        texts = [str(p) for p in predictions], [[str(y) for y in labels]]
        return np.array(metric()._extract_corpus_statistics(*texts), dtype=float)

    def value(sums: Array) -> Array:
        score, flat = metric()._compute_score_from_stats, sums.reshape(-1, sums.shape[-1])
        whole = [[round(number) for number in row] for row in flat]
        return np.array([score(row).score for row in whole]).reshape(sums.shape[:-1])

    return Corpus(sums, value)


METRICS: dict[str, Corpus] = {
    "f1_macro": Corpus(_class_counts, f1_macro),
    "f1_micro": Corpus(_all_counts, f1),
    "matthews": Corpus(_class_counts, matthews),
    "pearson": Corpus(lambda y, p: products(*_numbers(y, p)), pearson),
    "mean_squared_error": Corpus(_errors(2), ratio),
    "mean_absolute_error": Corpus(_errors(1), ratio),
    "token_accuracy": Corpus(_tags, ratio),
    "entity_f1": Corpus(_entities, f1),
    "entity_precision": Corpus(_entities, lambda s: ratio(s[..., [0, 1]])),
    "entity_recall": Corpus(_entities, lambda s: ratio(s[..., [0, 2]])),
    "loss": Corpus(_likelihoods, ratio),
    "perplexity": Corpus(_likelihoods, lambda s: np.exp(np.minimum(700.0, ratio(s)))),
    "word_error_rate": Corpus(_edits(True), ratio),
    "character_error_rate": Corpus(_edits(False), ratio),
    "bleu": _translation("BLEU"),
    "chrf": _translation("CHRF"),
}
BY_QUERY = ("ndcg_at_10", "mean_reciprocal_rank")
KNOWN = (*METRICS, "spearman", *BY_QUERY)


def spearman_parts(x: Array, y: Array, block: int = 256) -> Array:
    """The parts of the rank correlation of x and y: (item,). Ranks are those without the item."""
    from scipy import stats

    ranks, items = [stats.rankdata(values) for values in (x, y)], len(x)
    left = np.empty(items)
    for start in range(0, items, block):
        out = np.arange(start, min(start + block, items))
        # (left out, item): what stood above moves down by one; equal values share their mean rank.
        moved = [
            rank[None] - (values[out, None] < values[None]) - 0.5 * (values[out, None] == values[None])
            for rank, values in zip(ranks, (x, y), strict=True)
        ]
        sums = np.stack(
            [moved[0], moved[1], moved[0] ** 2, moved[1] ** 2, moved[0] * moved[1], np.ones_like(moved[0])],
            -1,
        )
        left[out] = pearson(sums.sum(1) - sums[np.arange(len(out)), out])
    whole = pearson(products(*ranks).sum(-2))
    return whole + (items - 1) * (left.mean() - left)


# -- from the records of runs ------------------------------------------------------------------------


def of_records(
    metric: str, records: Sequence[Record], scores: Scores, is_whole: bool = True
) -> Scores | None:
    """`corpus_scores` of the runs on record. None too where a run recorded another value than its parts give: then
    the metric was computed in another way, and the item scores are what is known.

    is_whole: False where `scores` has some of the items alone, for which no run recorded a value.
    """
    if metric not in KNOWN:
        return None
    measured = {str(record.arm): record for record in records if str(record.arm) in scores.of}
    untrained = (r.opened[0] for r in measured.values() if not r.arm.is_trained and r.opened[0])
    chance = next(untrained, None)
    lines: dict[str, list[list[Any]]] = {}
    for arm, record in measured.items():
        runs = [chance if opened is None else opened for opened in record.opened]
        if any(run is None for run in runs):
            return None
        by_item = [{line["item"]: line for line in run["items"]} for run in runs if run is not None]
        lines[arm] = [[run[item] for item in scores.items] for run in by_item]
    try:
        found = corpus_scores(metric, scores, lines)
    except (
        TypeError,
        ValueError,
        KeyError,
        ImportError,
    ):  # labels of another kind; a package that is not there
        return None
    for arm, record in measured.items() if found is not None and is_whole else ():
        for opened, of in zip(record.opened, found.of[arm], strict=True):  # type: ignore[union-attr]
            value = (opened or {}).get("metrics", {}).get(metric)
            if value is not None and abs(value - of.mean()) > 1e-6 * max(1.0, abs(value)):
                return None
    return found


@dataclass(frozen=True)
class Anew:
    """A metric that is computed anew on any items of the runs on record; higher is better in what it gives."""

    metric: str

    def of(self, records: Sequence[Record], scores: Scores, is_whole: bool = False) -> Scores | None:
        """Its parts on the items of `scores`, or None where they cannot be had."""
        from veneer.tasks import find_metric

        found = of_records(self.metric, records, scores, is_whole)
        return found if found is None or find_metric(self.metric).greater_is_better else found.turned()

    def by_group(
        self, records: Sequence[Record], scores: Scores, groups: Sequence[str]
    ) -> tuple[Scores, list[str]] | None:
        """Parts whose mean within a group is the metric of that group, and their groups.

        None where they cannot be had; so too where the items of one query are in several groups.
        """
        each = {}
        for name in dict.fromkeys(groups):
            found = self.of(records, scores.only([i for i, g in zip(scores.items, groups) if g == name]))
            if found is None:
                return None
            each[name] = found
        items = tuple(item for one in each.values() for item in one.items)
        if len(set(items)) < len(items):
            return None
        of = {arm: np.concatenate([one.of[arm] for one in each.values()], axis=1) for arm in scores.of}
        return replace(scores, of=of, items=items), [name for name, one in each.items() for _ in one.items]


def corpus_scores(metric: str, scores: Scores, lines: Mapping[str, Sequence[Sequence[Any]]]) -> Scores | None:
    """`scores` with the parts of `metric` in their place, in its own units; None where they cannot be had.

    lines: for each arm, a run's test lines ({"item", "prediction", "label"}) in the order of `scores.items`.
    With a metric of rankings the items become the queries.
    """
    if metric not in KNOWN:
        return None
    flat = [line for runs in lines.values() for run in runs for line in run]
    if any(line.get("prediction") is None or line.get("label") is None for line in flat):
        return None
    if metric in BY_QUERY:
        return _of_queries(metric, scores, lines)
    of = {arm: np.stack([_parts_of(metric, run) for run in runs]) for arm, runs in lines.items()}
    return replace(scores, of=of)


def _parts_of(metric: str, run: Sequence[Mapping[str, Any]]) -> Array:
    labels, predictions = [line["label"] for line in run], [line["prediction"] for line in run]
    if metric == "spearman":
        return spearman_parts(*_numbers(labels, predictions))
    corpus = METRICS[metric]
    return parts(corpus.sums(labels, predictions), corpus.value)


def _of_queries(metric: str, scores: Scores, lines: Mapping[str, Sequence[Sequence[Any]]]) -> Scores | None:
    from veneer.tasks import metrics

    first = next(iter(lines.values()))[0]
    if any("query" not in line for line in first):
        return None
    queries = tuple(dict.fromkeys(str(line["query"]) for line in first))
    if len(queries) < 2:
        return None
    of = {}
    for arm, runs in lines.items():
        rows = []
        for run in runs:
            by_query: dict[str, list[tuple[float, float]]] = {query: [] for query in queries}
            for line in run:
                by_query[str(line["query"])].append((float(line["label"]), float(line["prediction"])))
            if metric == "ndcg_at_10":
                pairs = [zip(*by_query[query], strict=True) for query in queries]
                rows.append([metrics.query_ndcg(list(y), list(p)) for y, p in pairs])
            else:
                rows.append([metrics.reciprocal_rank(by_query[query]) for query in queries])
        of[arm] = np.array(rows)
    return replace(scores, of=of, items=queries)
