"""Near-duplicates: found as by comparing every pair, taken out of training alone, and what is alike by rule stays."""

from __future__ import annotations

import random

import pytest

from veneer.data import Splits, without_near_copies
from veneer.data._near import SHINGLE, _pairs
from veneer.errors import BadData

_letters = random.Random(9)
WORDS = ["".join(_letters.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(6)) for _ in range(3000)]


def sentence(draw, size=14):
    return " ".join(draw.choice(WORDS) for _ in range(size))


def splits(train, validation, test, task="classify"):
    def rows(texts):
        return [{"text": text, "label": "a"} for text in texts]

    return Splits(rows(train), rows(validation), rows(test), task, {}, ["a", "b"])


def overlap(one, two):
    a, b = ({text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)} for text in (one, two))
    return len(a & b) / len(a | b)


def test_the_pairs_are_those_of_comparing_every_text_with_every_other():
    draw = random.Random(0)
    first = [sentence(draw) for _ in range(60)]
    second = [sentence(draw) for _ in range(20)]
    for at in range(40):  # copies with more and more words changed
        words = second[at % 20].split()
        for place in draw.sample(range(len(words)), at % 5):
            words[place] = draw.choice(WORDS)
        first.append(" ".join(words))
    for threshold in (0.5, 0.8, 0.95):
        wanted = {
            (a, b)
            for a, one in enumerate(first)
            for b, two in enumerate(second)
            if overlap(one, two) >= threshold
        }
        assert len(wanted) >= 8
        assert set(_pairs(first, second, threshold)) == wanted


def test_copies_leave_training_and_validation_and_the_test_keeps_all():
    draw = random.Random(1)
    train, validation, test = ([sentence(draw, 20) for _ in range(n)] for n in (60, 20, 20))
    changed = " ".join(["Changed", *test[0].split()[1:]])
    found, said = without_near_copies(
        splits(
            [*train, changed, test[1].upper() + "!", validation[0]], [*validation, test[2] + " indeed"], test
        )
    )
    assert [row["text"] for row in found.train] == train
    assert [row["text"] for row in found.validation] == validation
    assert [row["text"] for row in found.test] == test
    assert (said.train, said.validation, said.equal) == (3, 1, 2)
    assert "3 of train, 1 of validation, 2 of them equal" in str(said)
    exact, said = without_near_copies(splits([*train, changed, test[1].upper()], validation, test), 1)
    assert [row["text"] for row in exact.train] == [*train, changed]
    assert said.train == 1


def test_what_all_rows_begin_with_makes_them_no_copies():
    draw = random.Random(2)
    prompt = "Read the following review with care and say whether its author would see the film again: "
    train, test = ([prompt + sentence(draw, 4) for _ in range(n)] for n in (80, 20))
    found, said = without_near_copies(splits([*train, test[0] + "."], [], test))
    assert len(found.train) == 80
    assert said.train == 1


def test_variants_of_one_sequence_are_no_copies_but_equal_ones_are():
    draw = random.Random(3)
    base = [draw.choice("ACDEFGHIKLMNPQRSTVWY") for _ in range(200)]
    variants = []
    for place in range(60):
        variants.append("".join(base[:place] + ["X"] + base[place + 1 :]))
    found, said = without_near_copies(splits([*variants[:40], variants[45]], [], variants[40:]))
    assert said.train == 1
    assert len(found.train) == 40


def test_training_rows_that_are_mostly_copies_are_an_error_that_says_what_to_do():
    draw = random.Random(4)
    test = [sentence(draw) for _ in range(20)]
    with pytest.raises(BadData, match="near_duplicates=1"):
        without_near_copies(splits([*test, sentence(draw)], [], test))


def test_empty_and_short_texts_are_compared_as_wholes():
    found, _ = without_near_copies(splits(["a b", "c d", "e f", "g h"], [], ["A  B.", "x y"]))
    assert [row["text"] for row in found.train] == ["c d", "e f", "g h"]
    assert without_near_copies(splits(["a b", "c d"], [], []))[1].train == 0
