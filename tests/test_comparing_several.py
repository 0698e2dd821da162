"""Several data sets and bases in one file: one design, a folder for each pair, and what they say together."""

from __future__ import annotations

import json

import pytest

import training_tiny as tiny
from test_comparing_fake import RATES, SIZES, FakeTrainer
from test_comparing_file import written
from veneer.comparing import prepare_several, questions, read_comparison, run_several
from veneer.errors import BadOption, TrainingFailed, Unsupported

FILE = """
models = ["builtin:a", "builtin:b"]
methods = ["lora:rank=1", "lora:rank=4"]
budget = "demo"
seeds = 3
smallest_effect = 0.02

[[data]]
path = "one.csv"

[[data]]
path = "builtin:two"
metric = "loss"
smallest_effect = 0.1
"""


def silent(event):
    return None


def designs(folder, trainer=None, text=FILE):
    fields = read_comparison(written(folder, text))
    return prepare_several(fields, run_arm=trainer or FakeTrainer(), rates=RATES, sizes=SIZES)


def test_every_data_set_meets_every_base_with_its_own_fields(tmp_path):
    found = questions(read_comparison(written(tmp_path, FILE)))
    assert list(found) == ["one--a", "one--b", "two--a", "two--b"]
    assert found["one--b"]["model"] == "builtin:b"
    assert found["one--a"]["data"] == "one.csv"
    assert (found["one--a"]["smallest_effect"], found["two--a"]["smallest_effect"]) == (0.02, 0.1)
    assert "metric" not in found["one--a"]
    assert all("models" not in fields for fields in found.values())
    (only,) = questions(
        {"model": "m", "data": [{"data": "d", "task": "classify"}], "methods": ["lora"]}
    ).items()
    assert only == ("", {"model": "m", "data": "d", "task": "classify", "methods": ["lora"]})
    twice = {"model": "m", "data": [{"data": "x/one.csv"}, {"data": "y/one.csv"}]}
    with pytest.raises(BadOption, match="the folder 'one'"):
        questions(twice)
    twice["data"][1]["name"] = "other"
    assert list(questions(twice)) == ["one", "other"]


def test_all_are_hashed_before_the_first_runs_and_one_changes_the_hash(tmp_path):
    one = designs(tmp_path)
    assert one.sha256 == designs(tmp_path).sha256
    assert one.sha256 != designs(tmp_path, text=FILE.replace("0.1", "0.2")).sha256
    assert "4 comparisons" in str(one)
    assert str(one).count("smallest effect it can find") == 4


def test_each_pair_is_a_comparison_of_its_own_and_they_are_put_together(tmp_path):
    folder = tmp_path / "out"
    found = run_several(designs(tmp_path), folder, progress=silent)
    assert set(found.results) == {"one--a", "one--b", "two--a", "two--b"}
    for name in found.results:
        assert json.loads((folder / name / "summary.json").read_text())["comparison"]["seeds"] == [1, 2, 3]
        assert (folder / name / "comparison.toml").is_file()
    together = json.loads((folder / "across.json").read_text())
    assert together["tasks"] == 2
    assert found.together is not None
    assert "few" in str(found)
    assert read_comparison(folder / "comparison.toml")["models"] == ["builtin:a", "builtin:b"]
    assert json.loads((folder / "design.json").read_text())["sha256"] == designs(tmp_path).sha256


def test_a_kill_in_the_third_goes_on_there_and_what_is_done_is_not_done_again(tmp_path):
    folder = tmp_path / "out"
    whole = FakeTrainer()
    run_several(designs(tmp_path, whole), tmp_path / "whole", progress=silent)
    with pytest.raises(KeyboardInterrupt):
        run_several(designs(tmp_path, FakeTrainer(stop_after=60)), folder, progress=silent)
    rest = FakeTrainer()
    run_several(designs(tmp_path, rest), folder, progress=silent)
    assert len(rest.calls) == len(whole.calls) - 60
    assert (folder / "across.json").read_text() == (tmp_path / "whole" / "across.json").read_text()


def test_one_that_fails_stops_none_of_the_others(tmp_path):
    class Fails(FakeTrainer):
        def __call__(self, **job):
            if "two--b" in str(job["output"]):
                raise Unsupported("this base has no attention.")
            return super().__call__(**job)

    found = run_several(designs(tmp_path, Fails()), tmp_path / "out", progress=silent)
    assert list(found.failed) == ["two--b"]
    assert "no attention" in found.failed["two--b"]
    assert len(found.results) == 3

    class AllFail(FakeTrainer):
        def __call__(self, **job):
            raise RuntimeError("no disk")

    with pytest.raises(TrainingFailed, match="none of 4 comparisons"):
        run_several(designs(tmp_path, AllFail()), tmp_path / "none", progress=silent)


@pytest.mark.slow
def test_two_real_data_sets_on_two_tiny_bases(tmp_path):
    import csv

    for name, seed in (("films", 1), ("plays", 2)):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["text", "label"])
            out.writerows(
                [f"{r['text']} {i}", ["bad", "good"][r["label"]]]
                for i, r in enumerate(tiny.sentences(120, seed))
            )
    bases = [tiny.saved_bert(tmp_path / f"bert{seed}", seed) for seed in (0, 1)]
    fields = {
        "models": bases, "data": [{"data": str(tmp_path / f"{n}.csv")} for n in ("films", "plays")],
        "methods": ["lora:rank=2"], "seeds": 2, "trials": 1, "epochs": 1, "batch_size": 16, "controls": ["none"],
        "device": "cpu",
    }  # fmt: skip
    found = run_several(prepare_several(fields), tmp_path / "out", costs=False, progress=silent)
    assert set(found.results) == {"films--bert0", "films--bert1", "plays--bert0", "plays--bert1"}
    assert found.together.tasks == 2
