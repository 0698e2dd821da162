"""The default trainer: the constant guess of the untrained base, budgets, options checked before a run."""

from __future__ import annotations

import pytest

from veneer.comparing import parse_arm, parse_budget
from veneer.comparing.running.runner import default_runner
from veneer.errors import UnknownOption

pytest.importorskip("sklearn")


def rows(split, labels):
    return [{"text": f"{split} sentence number {i} about {i * 7}", "label": x} for i, x in enumerate(labels)]


DATA = {
    "train": rows("train", ["good"] * 6 + ["bad"] * 4),
    "validation": rows("held out", ["bad"] * 3 + ["good"]),
    "test": rows("last", ["good"] * 3 + ["bad"]),
}


def made(budget="published", **options):
    return default_runner("m", DATA, task="classify", budget=parse_budget(budget), options=options)


def test_the_untrained_base_guesses_the_majority_of_the_training_rows(tmp_path):
    splits = ("validation", "test")
    found = made()(arm=parse_arm("untrained"), seed=1, learning_rate=None, splits=splits, output=tmp_path)
    assert found.metrics["validation"]["accuracy"] == 0.25
    assert found.metrics["test"]["accuracy"] == 0.75
    assert [p["score"] for p in found.predictions["test"]] == [1.0, 1.0, 1.0, 0.0]
    assert found.predictions["test"][0]["probabilities"] == {"bad": 0.4, "good": 0.6}
    assert found.trainable_parameters == 0


def picture(path):
    from PIL import Image

    Image.new("RGB", (4, 4), (len(path.name) * 9 % 256, 0, 0)).save(path)
    return str(path)


def test_the_untrained_base_guesses_the_majority_of_pictures_too(tmp_path):
    data = {
        split: [
            {"image": picture(tmp_path / f"{split}-{i}.png"), "label": row["label"]}
            for i, row in enumerate(of)
        ]
        for split, of in DATA.items()
    }
    runner = default_runner("m", data, task="image-classify", budget=parse_budget("published"), options={})
    found = runner(arm=parse_arm("untrained"), seed=1, learning_rate=None, splits=("test",), output=tmp_path)
    assert found.metrics["test"]["accuracy"] == 0.75
    assert {p["prediction"] for p in found.predictions["test"]} == {"good"}


def test_a_budget_becomes_passes_over_the_training_rows():
    assert made("examples=25").options == {"epochs": 2.5}
    assert made("demo").options == {"epochs": 2}
    assert made("demo", epochs=1, batch_size=4).options == {"epochs": 1, "batch_size": 4}
    assert made("tokens=1e4").options == {"max_tokens": 10000}
    assert made("minutes=3").options == {"max_seconds": 180}


def test_the_data_have_a_digest_of_their_content():
    assert made().data_sha256 == made().data_sha256
    other = {**DATA, "test": rows("last", ["good"] * 2 + ["bad"] * 2)}
    changed = default_runner("m", other, task="classify", budget=parse_budget("published"), options={})
    assert made().data_sha256 != changed.data_sha256
    assert made().sizes == {"train": 10, "validation": 4, "test": 4}


def test_every_trained_method_declares_rates_and_wrong_options_are_said_first():
    runner = made()
    assert set(runner.families) <= set(runner.ranges)
    assert all(0 < low < high for low, high in runner.ranges.values())
    runner.check(parse_arm("lora:rank=4+lora_plus"))
    with pytest.raises(UnknownOption, match="rnk"):
        runner.check(parse_arm("lora:rnk=4"))


def test_near_duplicates_of_held_out_rows_leave_training_and_stand_in_the_design():
    from veneer.comparing import prepare
    from veneer.data import Splits

    copy = {**DATA["test"][0], "text": DATA["test"][0]["text"].upper() + "!"}
    data = Splits([*DATA["train"], copy], DATA["validation"], DATA["test"], "classify", {}, ["bad", "good"])
    found = prepare("m", data, "lora", near_duplicates=1)
    assert found.design.near_duplicates == {"train": 1, "validation": 0, "equal": 1, "threshold": 1.0}
    assert found.design.sizes == {"train": 10, "validation": 4, "test": 4}
    assert "1 of train" in str(found)
    assert len(data.train) == 11  # what was given is as it was
    assert prepare("m", DATA, "lora", task="classify", near_duplicates=1).design.near_duplicates["train"] == 0
