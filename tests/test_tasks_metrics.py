"""Every metric against a value worked by hand."""

import math

import pytest

from veneer.errors import UnknownName
from veneer.tasks import METRICS, find_metric
from veneer.tasks import metrics as m

NER_TRUE = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"]]
NER_SAID = [["B-PER", "I-PER", "O", "B-ORG"], ["O", "B-ORG"]]  # 2 of 3 said are right, 2 of 3 true are found

BY_HAND = {
    "accuracy": (([0, 1, 1, 0], [0, 1, 0, 0]), 3 / 4),
    # class 0: precision 2/3, recall 1, F1 0.8; class 1: precision 1, recall 1/2, F1 2/3
    "f1_macro": (([0, 1, 1, 0], [0, 1, 0, 0]), (0.8 + 2 / 3) / 2),
    # labels set and said: 3 true, 2 said, both right: 2 * 2 / (3 + 2)
    "f1_micro": (([[1, 0], [1, 1]], [[1, 0], [1, 0]]), 0.8),
    # TP 1, TN 2, FP 0, FN 1: (2 - 0) / sqrt(1 * 2 * 2 * 3)
    "matthews": (([0, 1, 1, 0], [0, 1, 0, 0]), 2 / math.sqrt(12)),
    "log_loss": (([0, 1], [[0.5, 0.5], [0.75, 0.25]]), (math.log(2) + math.log(4)) / 2),
    # two bins, each with two items: confidence 0.9, accuracy 1/2; confidence 0.6, accuracy 1
    "calibration_error": (
        ([0, 1, 0, 1], [[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]]), (0.4 + 0.4) / 2
    ),
    "subset_accuracy": (([[1, 0], [1, 1]], [[1, 0], [1, 0]]), 1 / 2),
    # deviations (-1, 0, 1) and (-1, 1, 0): 1 / 2
    "pearson": (([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]), 0.5),
    # ranks 1, 2, 3 and 1, 3, 2: 1 - 6 * 2 / (3 * 8)
    "spearman": (([1.0, 2.0, 30.0], [0.0, 9.0, 5.0]), 0.5),
    "mean_squared_error": (([1.0, 2.0], [1.0, 4.0]), 2.0),
    "mean_absolute_error": (([1.0, 2.0], [1.0, 4.0]), 1.0),
    "token_accuracy": ((NER_TRUE, NER_SAID), 5 / 6),
    "entity_f1": ((NER_TRUE, NER_SAID), 2 / 3),
    "entity_precision": (([["B-A", "O"]], [["B-A", "B-A"]]), 1 / 2),
    "entity_recall": (([["B-A", "B-A"]], [["B-A", "O"]]), 1 / 2),
    # "The Cat" is "cat" in normal form
    "exact_match": (([["cat"], ["dog", "hound"], []], ["The Cat!", "a big hound", ""]), 2 / 3),
    # "big hound" and "hound": precision 1/2, recall 1, F1 2/3
    "word_f1": (([["cat"], ["dog", "hound"], []], ["The Cat!", "a big hound", ""]), (1 + 2 / 3 + 1) / 3),
    # precisions 4/5, 3/4, 2/3, 1/2; no penalty of shortness
    "bleu": ((["a b c d x"], ["a b c d e"]), 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
    # one word of two characters, one of them right: 1-grams P = R = 1/2, 2-grams 0; mean over the 2 orders
    "chrf": ((["ab"], ["ac"]), 100 * 0.25),
    # "a b c" to "a x c d": one substitution, one insertion, over 3 words
    "word_error_rate": ((["a b c"], ["a x c d"]), 2 / 3),
    "character_error_rate": ((["kitten"], ["sitting"]), 3 / 6),
    # the relevant one is second, then first
    "mean_reciprocal_rank": (([[0, 1], [1, 0]], [[0.9, 0.1], [0.9, 0.1]]), (1 / 2 + 1) / 2),
    # gains 1 / log2(3) of 1, then 1
    "ndcg_at_10": (([[0, 1], [1, 0]], [[0.9, 0.1], [0.9, 0.1]]), (1 / math.log2(3) + 1) / 2),
    # 4 + 2 nats over 2 + 4 tokens
    "loss": (([2, 4], [4.0, 2.0]), 1.0),
    "perplexity": (([2, 4], [4.0, 2.0]), math.e),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_metric_is_its_hand_value(name):
    arguments, expected = BY_HAND[name]
    assert find_metric(name).function(*arguments) == pytest.approx(expected, abs=1e-9)


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(UnknownName, match="accuracy"):
        find_metric("acuracy")


def test_constant_predictions_have_no_correlation_and_no_warning():
    assert m.spearman([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) == 0.0


def test_equal_scores_do_not_win_a_rank():
    assert m.reciprocal_rank([(1, 0.0), (0, 0.0), (0, 0.0)]) == 1 / 3


def test_edits_are_levenshteins():
    assert m.edits("kitten", "sitting") == 3
    assert m.edits([], [1, 2]) == 2
    assert m.edits("abc", "abc") == 0
