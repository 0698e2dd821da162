"""Metrics: each is one function of labels and predictions, with the direction that is better.

Where a well-kept library computes a metric, it computes it here; the rest is a few lines and a hand value
in the tests. `METRICS` is the table that names, directions and errors come from.
"""

from __future__ import annotations

import collections
import math
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.errors import UnknownName, missing_package, nearest


@dataclass(frozen=True)
class Metric:
    """A metric by name: `function(labels, predictions)`, and whether more of it is better."""

    name: str
    function: Callable[..., float]
    greater_is_better: bool = True
    meaning: str = ""


METRICS: dict[str, Metric] = {}


def metric(meaning: str, *, greater_is_better: bool = True) -> Callable[[Callable], Callable]:
    """Enter a function into `METRICS` under its own name."""

    def enter(function: Callable) -> Callable:
        METRICS[function.__name__] = Metric(function.__name__, function, greater_is_better, meaning)
        return function

    return enter


def find_metric(name: str) -> Metric:
    """The metric of this name; UnknownName with the nearest otherwise."""
    if name not in METRICS:
        raise UnknownName(
            f"no metric is called {name!r}.",
            nearest=nearest(name, METRICS),
            next_step=f"one of {', '.join(sorted(METRICS))}",
        )
    return METRICS[name]


def _sklearn() -> Any:
    try:
        import sklearn.metrics as metrics
    except ImportError as error:
        raise missing_package("scikit-learn", "train", "computing this metric") from error
    return metrics


@metric("part of the items whose class is right")
def accuracy(labels: Sequence, predictions: Sequence) -> float:
    return float(_sklearn().accuracy_score(labels, predictions))


@metric("F1, averaged over the classes with equal weight")
def f1_macro(labels: Sequence, predictions: Sequence) -> float:
    return float(_sklearn().f1_score(labels, predictions, average="macro", zero_division=0))


@metric("F1 of all decisions together")
def f1_micro(labels: Sequence, predictions: Sequence) -> float:
    return float(_sklearn().f1_score(labels, predictions, average="micro", zero_division=0))


@metric("Matthews' correlation of labels and predicted classes")
def matthews(labels: Sequence, predictions: Sequence) -> float:
    return float(_sklearn().matthews_corrcoef(labels, predictions))


@metric("mean negative log probability of the true class, in nats", greater_is_better=False)
def log_loss(labels: Sequence[int], probabilities: Sequence[Sequence[float]]) -> float:
    picked = [max(float(p[y]), 1e-15) for y, p in zip(labels, probabilities)]
    return -sum(map(math.log, picked)) / len(picked)


@metric(
    "expected calibration error: |confidence - accuracy|, 15 bins of equal width", greater_is_better=False
)
def calibration_error(
    labels: Sequence[int], probabilities: Sequence[Sequence[float]], bins: int = 15
) -> float:
    """Guo et al., 2017, arXiv:1706.04599: bins (k/n, (k+1)/n] of the winning probability, weighted by
    count.
    """
    inside: dict[int, list[tuple[float, bool]]] = collections.defaultdict(list)
    for y, p in zip(labels, probabilities):
        best = max(range(len(p)), key=p.__getitem__)
        inside[max(0, math.ceil(p[best] * bins) - 1)].append((p[best], best == y))
    gaps = [abs(sum(c for c, _ in found) - sum(right for _, right in found)) for found in inside.values()]
    return sum(gaps) / len(labels)


@metric("part of the items whose whole set of labels is right")
def subset_accuracy(labels: Sequence[Sequence[int]], predictions: Sequence[Sequence[int]]) -> float:
    return float(_sklearn().accuracy_score(labels, predictions))


def _correlation(kind: str, labels: Sequence[float], predictions: Sequence[float]) -> float:
    """scipy's correlation; 0 where one side is constant, since nothing is then predicted."""
    try:
        from scipy import stats
    except ImportError as error:
        raise missing_package("scipy", "train", "a correlation") from error
    if len(set(labels)) < 2 or len(set(predictions)) < 2:
        return 0.0
    return float(getattr(stats, kind)(labels, predictions).statistic)


@metric("linear correlation")
def pearson(labels: Sequence[float], predictions: Sequence[float]) -> float:
    return _correlation("pearsonr", labels, predictions)


@metric("correlation of ranks")
def spearman(labels: Sequence[float], predictions: Sequence[float]) -> float:
    return _correlation("spearmanr", labels, predictions)


@metric("mean squared error", greater_is_better=False)
def mean_squared_error(labels: Sequence[float], predictions: Sequence[float]) -> float:
    return float(_sklearn().mean_squared_error(labels, predictions))


@metric("mean absolute error", greater_is_better=False)
def mean_absolute_error(labels: Sequence[float], predictions: Sequence[float]) -> float:
    return float(_sklearn().mean_absolute_error(labels, predictions))


@metric("part of the tokens whose tag is right")
def token_accuracy(labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> float:
    pairs = [(y, p) for ys, ps in zip(labels, predictions) for y, p in zip(ys, ps)]
    return sum(y == p for y, p in pairs) / len(pairs) if pairs else 0.0


@metric("F1 of whole entities (seqeval)")
def entity_f1(labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> float:
    return _seqeval("f1_score", labels, predictions)


@metric("precision of whole entities (seqeval)")
def entity_precision(labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> float:
    return _seqeval("precision_score", labels, predictions)


@metric("recall of whole entities (seqeval)")
def entity_recall(labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> float:
    return _seqeval("recall_score", labels, predictions)


def _seqeval(name: str, labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> float:
    try:
        from seqeval import metrics
    except ImportError as error:
        raise missing_package("seqeval", "train", "the F1 of entities") from error
    return float(
        getattr(metrics, name)([list(y) for y in labels], [list(p) for p in predictions], zero_division=0)
    )


def normal_answer(text: str) -> str:
    """An answer without case, punctuation, articles and spare spaces (SQuAD; Rajpurkar et al., 2016)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_f1(answers: Sequence[str], predicted: str) -> float:
    """The best word F1 of one prediction over its accepted answers; an empty answer asks for an empty one."""
    return max((_word_f1(answer, predicted) for answer in answers), default=float(not predicted.strip()))


def _word_f1(answer: str, predicted: str) -> float:
    y, p = normal_answer(answer).split(), normal_answer(predicted).split()
    if not y or not p:
        return float(y == p)
    shared = sum((collections.Counter(y) & collections.Counter(p)).values())
    return 2 * shared / (len(y) + len(p))


def answer_exact(answers: Sequence[str], predicted: str) -> float:
    """1 where the normal form of the prediction is one of the answers'; no answers ask for an empty one."""
    return float(normal_answer(predicted) in {normal_answer(a) for a in answers or [""]})


@metric("part of the answers that are equal in normal form")
def exact_match(labels: Sequence[Sequence[str]], predictions: Sequence[str]) -> float:
    return sum(answer_exact(y, p) for y, p in zip(labels, predictions)) / len(labels)


@metric("word F1 of answers")
def word_f1(labels: Sequence[Sequence[str]], predictions: Sequence[str]) -> float:
    return sum(answer_f1(y, p) for y, p in zip(labels, predictions)) / len(labels)


@metric("BLEU of the corpus, 0 to 100 (sacrebleu)")
def bleu(labels: Sequence[str], predictions: Sequence[str]) -> float:
    return float(_sacrebleu().corpus_bleu(list(predictions), [list(labels)]).score)


@metric("chrF of the corpus, 0 to 100 (sacrebleu)")
def chrf(labels: Sequence[str], predictions: Sequence[str]) -> float:
    return float(_sacrebleu().corpus_chrf(list(predictions), [list(labels)]).score)


def sentence_chrf(label: str, prediction: str) -> float:
    """chrF of one sentence, 0 to 100."""
    return float(_sacrebleu().sentence_chrf(prediction, [label]).score)


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise missing_package("sacrebleu", "train", "BLEU and chrF") from error
    return sacrebleu


def edits(label: Sequence, prediction: Sequence) -> int:
    """The least number of insertions, deletions and substitutions between two sequences (Levenshtein)."""
    row = list(range(len(prediction) + 1))
    for i, y in enumerate(label, 1):
        diagonal, row[0] = row[0], i
        for j, p in enumerate(prediction, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (y != p))
    return row[-1]


@metric("word error rate: edits over the words of the labels", greater_is_better=False)
def word_error_rate(labels: Sequence[str], predictions: Sequence[str]) -> float:
    return _error_rate([y.split() for y in labels], [p.split() for p in predictions])


@metric("character error rate: edits over the characters of the labels", greater_is_better=False)
def character_error_rate(labels: Sequence[str], predictions: Sequence[str]) -> float:
    return _error_rate(labels, predictions)


def _error_rate(labels: Sequence[Sequence], predictions: Sequence[Sequence]) -> float:
    length = sum(map(len, labels))
    return sum(edits(y, p) for y, p in zip(labels, predictions)) / max(1, length)


Ranking = Sequence[tuple[float, float]]  # (label, score) of the candidates of one query


def reciprocal_rank(ranking: Ranking) -> float:
    """1 over the place of the first relevant candidate (label above 0); equal scores count as behind it."""
    relevant = [s for y, s in ranking if y > 0]
    if not relevant:
        return 0.0
    best = max(relevant)
    return 1 / (1 + sum(s >= best for y, s in ranking if y <= 0))


@metric("mean over queries of 1 / place of the first relevant candidate")
def mean_reciprocal_rank(labels: Sequence[Sequence[float]], predictions: Sequence[Sequence[float]]) -> float:
    return sum(reciprocal_rank(list(zip(y, p))) for y, p in zip(labels, predictions)) / len(labels)


@metric("normalised discounted cumulative gain of the first ten")
def ndcg_at_10(labels: Sequence[Sequence[float]], predictions: Sequence[Sequence[float]]) -> float:
    return sum(query_ndcg(y, p) for y, p in zip(labels, predictions)) / len(labels)


def query_ndcg(labels: Sequence[float], scores: Sequence[float], k: int = 10) -> float:
    """sum of label / log2(place + 1) over the first k, over the best that can be had."""
    if len(labels) == 1:
        return float(labels[0] > 0)
    return float(_sklearn().ndcg_score([list(labels)], [list(scores)], k=k)) if any(labels) else 0.0


@metric("mean negative log likelihood a token, in nats", greater_is_better=False)
def loss(labels: Sequence[int], losses: Sequence[float]) -> float:
    """labels: tokens of each item; losses: summed negative log likelihood of each item."""
    return sum(losses) / max(1, sum(labels))


@metric("exp of the mean negative log likelihood a token", greater_is_better=False)
def perplexity(labels: Sequence[int], losses: Sequence[float]) -> float:
    return math.exp(min(700.0, loss(labels, losses)))
