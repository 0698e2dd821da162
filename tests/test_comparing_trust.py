"""What must not matter does not: names, order, test labels; and labels that say nothing leave every arm at chance.

Real trainings of a tiny encoder; `test_comparing_run.py` has the same with a trainer in numpy.
"""

from __future__ import annotations

import json
import random

import pytest
import torch

import training_tiny as tiny
from veneer.comparing import compare

torch.set_num_threads(1)
pytestmark = pytest.mark.slow
HOW = {"seeds": 2, "trials": 2, "epochs": 2, "batch_size": 16, "device": "cpu", "costs": False, "progress": None,
       "extend_rates": 0, "controls": "none", "near_duplicates": 1,
       "rates": {"lora": [3e-3, 3e-2], "full": [1e-3, 3e-3], "linear_probe": [1e-3, 3e-2],
                 "ia3": [1e-2, 1e-1]}}  # fmt: skip


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return tiny.saved_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def plain(spec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return compare(spec, tiny.opened(), "lora:rank=2,ia3", output=folder, **HOW)


def scores(result):
    lines = [json.loads(line) for line in (result.folder / "scores.jsonl").read_text().splitlines()]
    return {(line["arm"], line["seed"], line["item"]): line["score"] for line in lines}


def test_reordering_arms_changes_no_score_and_no_verdict(spec, plain, tmp_path):
    other = compare(spec, tiny.opened(), "ia3,lora:rank=2", output=tmp_path, **HOW)
    assert scores(other) == scores(plain)
    one, two = ({a["arm"]: a for a in result.to_dict()["arms"]} for result in (plain, other))
    for arm in one:
        for key in ("mean", "low", "high", "p_adjusted", "tied_with_best", "front_probability"):
            assert one[arm][key] == two[arm][key], (arm, key)
    assert other.best == plain.best


def test_an_arm_under_another_name_has_the_same_scores(spec, plain, tmp_path):
    """`r` is another name of `rank`; the text of an arm is its name, and nothing is drawn from it."""
    other = compare(spec, tiny.opened(), "lora:r=2,ia3", output=tmp_path, **HOW)
    renamed = {
        (arm.replace("lora:r=2", "lora:rank=2"), *rest): s for (arm, *rest), s in scores(other).items()
    }
    assert renamed == scores(plain)


def test_flipping_the_test_labels_changes_neither_rates_nor_what_is_kept(spec, plain, tmp_path):
    data = tiny.opened()
    data.test = [{**row, "label": 1 - row["label"]} for row in data.test]
    other = compare(spec, data, "lora:rank=2,ia3", output=tmp_path, **HOW)
    chosen = [{(row["arm"], row["learning_rate"]) for row in result.rows} for result in (plain, other)]
    assert chosen[0] == chosen[1]
    kept = [
        sorted(str(path.relative_to(result.folder)) for path in (result.folder / "runs").glob("*/*"))
        for result in (plain, other)
    ]
    assert kept[0] == kept[1]
    before, after = scores(plain), scores(other)
    assert all(after[key] == 1 - value for key, value in before.items())


def test_shuffled_training_labels_leave_every_arm_at_chance(spec, tmp_path):
    data = tiny.opened(200, 200, 300)
    labels = [row["label"] for row in data.train]
    random.Random(0).shuffle(labels)
    data.train = [{**row, "label": label} for row, label in zip(data.train, labels)]
    result = compare(spec, data, "lora:rank=2,ia3", output=tmp_path, **HOW | {"seeds": 6, "epochs": 4})
    for arm in result.to_dict()["arms"]:
        assert arm["low"] < 0.5 + 0.03, arm["arm"]
        assert abs(arm["mean"] - 0.5) < 0.1, arm["arm"]
    true = tiny.opened(200, 200, 300)
    learns = compare(spec, true, "lora:rank=2", output=tmp_path / "true", **HOW | {"epochs": 8})
    assert learns.analysis.arm("full").interval.estimate > 0.9  # the same with labels that say something
