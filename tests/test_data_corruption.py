"""Corrupted copies: repeatable, no more than the severity says, and nothing but what is read is touched."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.data import corrupt_row, parse_corruptions
from veneer.data.corruption import (
    COVERED,
    IMAGE,
    NOISE,
    SHARES,
    TEXT,
    corrupt_image,
    corrupt_text,
    corrupt_words,
)
from veneer.errors import BadOption, UnknownName

LONG = " ".join(f"wonderful{i} story" for i in range(50))


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_a_share_of_the_words_is_hit_and_the_others_stay(kind, severity):
    words = LONG.split(" ")
    changed = corrupt_words(words, kind, severity)
    assert sum(a != b for a, b in zip(words, changed)) == round(SHARES[severity - 1] * 100)


@pytest.mark.parametrize("kind", TEXT)
def test_the_same_seed_gives_the_same_text_and_another_seed_another(kind):
    assert corrupt_text(LONG, kind, 3, seed=1) == corrupt_text(LONG, kind, 3, seed=1)
    assert corrupt_text(LONG, kind, 3, seed=1) != corrupt_text(LONG, kind, 3, seed=2)


def test_each_kind_does_what_its_name_says():
    assert sorted(corrupt_text("abcdef", "swaps")) == sorted("abcdef")
    assert corrupt_text("Hello World", "case").lower() == "hello world"
    assert corrupt_text("Hello World", "case") != "Hello World"
    assert len(corrupt_text("one two three", "drops", 5).split()) == 1
    assert corrupt_text("lonely", "drops", 5) == "lonely"  # a text is never emptied
    assert abs(len(corrupt_text("story", "typos")) - 5) <= 1


@given(st.text(max_size=60), st.sampled_from(sorted(TEXT)), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_any_text_can_be_corrupted_and_none_becomes_empty(text, kind, severity):
    changed = corrupt_text(text, kind, severity)
    assert bool(changed.strip(" ")) == bool(text.strip(" "))
    assert changed == corrupt_text(text, kind, severity)


def picture():
    from PIL import Image

    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(60, 200, (40, 60, 3), dtype=np.uint8))


def pixels(data):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)), dtype=float) / 255


def test_noise_contrast_blur_and_occlusion_by_their_figures():
    clean = np.asarray(picture(), dtype=float) / 255
    noisy = pixels(corrupt_image(picture(), "noise", 1)) - clean
    assert noisy.std() == pytest.approx(NOISE[0], rel=0.05)
    flat = pixels(corrupt_image(picture(), "contrast", 2))
    assert flat.std() == pytest.approx(0.3 * clean.std(), rel=0.05)
    assert flat.mean() == pytest.approx(clean.mean(), abs=0.01)
    assert pixels(corrupt_image(picture(), "blur", 3)).std() < 0.7 * clean.std()
    covered = (np.abs(pixels(corrupt_image(picture(), "occlusion", 4)) - 0.5) < 0.003).all(-1)
    assert covered.mean() == pytest.approx(COVERED[3], abs=0.03)


@pytest.mark.parametrize("kind", IMAGE)
def test_a_picture_is_corrupted_alike_every_time_and_keeps_its_size(kind):
    one = corrupt_image(picture(), kind, 3)
    assert one == corrupt_image(picture(), kind, 3)
    assert pixels(one).shape == (40, 60, 3)


def test_a_row_keeps_what_is_predicted():
    row = {"text": "a very fine film", "label": "good", "source": "web"}
    changed = corrupt_row(row, "classify", "typos", 5)
    assert changed["text"] != row["text"]
    assert {**changed, "text": row["text"]} == row
    asked = corrupt_row(
        {"question": "who went home", "context": "he went home", "answers": {}}, "qa", "swaps", 5
    )
    assert asked["context"] == "he went home"
    tagged = {"tokens": ["New York", "is", "large"], "tags": ["P", "V", "A"]}
    spoiled = corrupt_row(tagged, "tag", "typos", 5)
    assert len(spoiled["tokens"]) == 3
    assert spoiled["tokens"] != tagged["tokens"]
    assert tagged["tokens"] == ["New York", "is", "large"]


def test_what_is_asked_for_is_read_and_what_does_not_fit_is_said():
    assert parse_corruptions("typos,case:5", "classify") == [("typos", 3), ("case", 5)]
    assert parse_corruptions(["all"], "image-classify") == [(kind, 3) for kind in IMAGE]
    assert parse_corruptions("all:1", "tag") == [("typos", 1), ("swaps", 1), ("case", 1)]
    with pytest.raises(UnknownName) as caught:
        parse_corruptions("typoes", "classify")
    assert "typos" in caught.value.nearest
    with pytest.raises(BadOption, match="expected a number from 1 to 5"):
        parse_corruptions("typos:9", "classify")
    with pytest.raises(BadOption, match="does not fit"):
        parse_corruptions("blur", "classify")
    with pytest.raises(BadOption, match="cannot be corrupted"):
        parse_corruptions("all", "lm")
