"""Beyond one number: calibration, groups, shifted and corrupted sets, forgetting; by hand, and in a comparison."""

import json

import numpy as np
import pytest

from test_comparing_fake import RATES, SIZES, FakeTrainer
from veneer.comparing import compare, from_results
from veneer.comparing.inference.analysis import Scores
from veneer.comparing.measures.calibration import (
    bin_edges,
    calibration,
    calibration_error,
    confidence_of,
    error_by_chance,
    reliability,
    stability,
)
from veneer.comparing.measures.further import TRAIN_SAMPLE, Further, further_of, groups_of
from veneer.comparing.measures.groups import by_group, difference_apart, spread_apart
from veneer.comparing.reporting.robustness import corrupted, forgotten, shifted
from veneer.errors import BadData, BadOption, UnknownName

# -- calibration -------------------------------------------------------------------------------------


def test_the_calibration_error_by_hand():
    """Two bins of two: |0.65 - 0.5| and |0.85 - 1|, weighted by their halves."""
    confidence, right = np.array([0.6, 0.7, 0.8, 0.9]), np.array([1.0, 0.0, 1.0, 1.0])
    assert calibration_error(confidence, right, bins=2) == pytest.approx((0.15 + 0.15) / 2)
    assert calibration_error(confidence, right, bins=1) == pytest.approx(0.0)  # 0.75 on both sides


def test_bins_hold_equal_numbers_and_equal_confidences_stay_together():
    rng = np.random.default_rng(0)
    confidence = rng.random(300)
    place = np.digitize(confidence, bin_edges(confidence), right=True)
    assert set(np.bincount(place)) == {20}
    same = np.full(300, 0.7)
    assert calibration_error(same, (np.arange(300) < 210).astype(float)) == pytest.approx(0.0)


def test_a_calibrated_arm_has_the_error_of_chance_and_an_overconfident_one_more():
    rng = np.random.default_rng(1)
    confidence = 0.5 + rng.random(300) / 2
    errors = [calibration_error(confidence, (rng.random(300) < confidence).astype(float)) for _ in range(300)]
    assert np.mean(errors) == pytest.approx(error_by_chance(confidence), rel=0.05)
    sure = np.full(300, 0.99)
    assert calibration_error(sure, (rng.random(300) < 0.8).astype(float)) > 0.1 > 2 * error_by_chance(sure)


def test_confidence_is_that_of_the_chosen_class_and_the_brier_score_sums_over_classes():
    line = {"prediction": "a", "label": "b", "probabilities": {"a": 0.7, "b": 0.2, "c": 0.1}}
    assert confidence_of(line) == {"confidence": 0.7, "brier": pytest.approx(0.49 + 0.64 + 0.01)}
    assert confidence_of({"prediction": 1.0, "label": 2.0}) == {}
    assert confidence_of({"prediction": "a", "label": "b", "probabilities": [0.5, 0.5]}) == {}
    assert confidence_of({"prediction": ["a"], "label": ["a"], "probabilities": {"a": 0.9, "b": 0.4}}) == {}


def opened(confidence, right):
    return {"items": [{"item": f"{i:04}", "score": float(r), "confidence": float(c), "brier": 2 * (c - r) ** 2}
                      for i, (c, r) in enumerate(zip(confidence, right))]}  # fmt: skip


def test_a_reliability_table_pools_seeds_and_says_how_far_they_differ():
    rng = np.random.default_rng(2)
    confidence = 0.5 + rng.random((6, 300)) / 2
    right = (rng.random((6, 300)) < confidence - 0.1).astype(float)
    table = reliability(confidence, right)
    assert len(table) == 15
    assert sum(row["n"] for row in table) == pytest.approx(300)
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in table)
    found = calibration([opened(c, r) for c, r in zip(confidence, right)])
    assert found["overconfidence"]["low"] < 0.1 < found["overconfidence"]["high"]
    assert found["overconfidence"]["low"] > 0
    assert found["error"]["mean"] > found["by_chance"]


def test_runs_that_diverged_are_counted_and_one_run_has_no_interval_over_seeds():
    one = opened([0.6, 0.7, 0.9, 0.8], [1, 0, 1, 1])
    found = calibration([one, None])
    assert (found["seeds"], found["diverged"]) == (1, 1)
    assert found["error"]["low"] is None
    assert calibration([None]) is None
    assert calibration([{"items": [{"item": "a", "score": 1.0}]}]) is None
    assert calibration([one, one, one], distinct=False)["seeds"] == 1


@pytest.mark.slow
def test_the_interval_of_the_deviation_covers_at_six_seeds_where_the_bootstrap_does_not():
    rng = np.random.default_rng(0)
    found = [stability(rng.normal(0, 1, 6), resamples=500) for _ in range(1000)]
    normal = np.mean([one["low"] <= 1 <= one["high"] for one in found])
    bootstrap = np.mean([one["bootstrap_low"] <= 1 <= one["bootstrap_high"] for one in found])
    assert 0.93 < normal < 0.97
    assert bootstrap < 0.85


def test_stability_of_equal_runs_is_zero_and_of_one_run_unknown():
    assert stability(np.full(6, 0.8))["deviation"] == 0.0
    assert stability(np.array([0.8]))["deviation"] is None
    found = stability(np.array([0.80, 0.82, 0.84]))
    assert found["deviation"] == pytest.approx(0.02)
    assert found["low"] < 0.02 < found["high"]


# -- groups ------------------------------------------------------------------------------------------


def drawn(rng, means, seeds=6, items=80, seed_sd=0.02):
    """Scores of independent groups with these true means, and the group of each item."""
    shift = rng.normal(0, seed_sd, (seeds, 1))
    parts = [m + shift + rng.normal(0, 0.3, (1, items)) + rng.normal(0, 0.2, (seeds, items)) for m in means]
    return np.concatenate(parts, axis=1), [str(g) for g in range(len(means)) for _ in range(items)]


def test_groups_are_scored_apart_and_small_ones_are_marked_and_left_out():
    scores = np.concatenate([np.ones((3, 40)), np.zeros((3, 50)), np.zeros((3, 5)), np.ones((3, 1))], axis=1)
    found = by_group(scores, ["a"] * 40 + ["b"] * 50 + ["few"] * 5 + ["one"])
    rows = {row["group"]: row for row in found["groups"]}
    assert {name: row["n"] for name, row in rows.items()} == {"a": 40, "b": 50, "few": 5, "one": 1}
    assert [name for name, row in rows.items() if row["small"]] == ["few", "one"]
    assert rows["one"]["low"] is None
    assert found["worst"]["group"] == "b"
    assert found["gap"]["difference"] == 1.0
    assert by_group(scores[:, :40], ["a"] * 40)["gap"] is None
    names = ["10 to 20", "-3 to 2", "3 to 9"]
    spans = by_group(scores[:, :90], [names[i % 3] for i in range(90)])
    assert [row["group"] for row in spans["groups"]] == ["-3 to 2", "3 to 9", "10 to 20"]


def test_a_difference_over_other_items_shares_the_seeds():
    """Runs that are better on both sets leave the difference alone: the seeds' variance must not enter it."""
    rng = np.random.default_rng(3)
    luck = rng.normal(0, 0.2, (6, 1))
    first, second = 0.8 + luck + rng.normal(0, 0.1, (1, 300)), 0.7 + luck + rng.normal(0, 0.1, (1, 200))
    found = difference_apart(np.broadcast_to(first, (6, 300)), np.broadcast_to(second, (6, 200)))
    assert found["low"] < 0.1 < found["high"]
    assert found["high"] - found["low"] < 0.06
    assert spread_apart(first, second).from_seeds == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("means", [(0.8, 0.8, 0.8, 0.8), (0.8, 0.75, 0.7, 0.9)])
def test_the_worst_group_and_the_gap_are_covered_though_they_are_chosen(means):
    """The naive interval of the group that looks worst misses far more often where groups are alike."""
    rng = np.random.default_rng(4)
    covers = {"worst": 0, "gap": 0, "naive": 0}
    repeats = 300
    for _ in range(repeats):
        scores, groups = drawn(rng, means)
        found = by_group(scores, groups)
        worst, gap = found["worst"], found["gap"]
        covers["worst"] += worst["low"] <= min(means) <= worst["high"]
        covers["gap"] += gap["low"] <= max(means) - min(means) <= gap["high"]
        row = next(row for row in found["groups"] if row["group"] == worst["group"])
        covers["naive"] += row["low"] <= min(means) <= row["high"]
    assert covers["worst"] / repeats > 0.94
    assert covers["gap"] / repeats > 0.94
    if len(set(means)) == 1:
        assert covers["naive"] < covers["worst"]


def test_groups_come_from_a_column_by_value_or_by_quarters():
    rows = [{"text": "x", "source": "ab"[i % 2], "rating": i / 10, "missing": None} for i in range(40)]
    assert groups_of(rows, "source")["1"] == "b"
    quarters = groups_of(rows, "rating")
    assert len(set(quarters.values())) == 4
    assert quarters["0"] == "0 to 0.9"
    assert set(groups_of(rows, "missing").values()) == {"(none)"}
    with pytest.raises(UnknownName, match="no column 'sorce'") as caught:
        groups_of(rows, "sorce")
    assert "source" in caught.value.nearest
    with pytest.raises(BadOption, match="40 different values"):
        groups_of([{"id": f"row {i}"} for i in range(40)], "id")


# -- other sets --------------------------------------------------------------------------------------


def made(**of):
    rows = {arm: np.asarray(scores, dtype=float) for arm, scores in of.items()}
    items = tuple(map(str, range(next(iter(rows.values())).shape[1])))
    return Scores(rows, {arm: tuple(range(len(r))) for arm, r in rows.items()}, items)


def test_a_drop_is_in_domain_less_shifted():
    rng = np.random.default_rng(5)
    inside = made(a=rng.random((6, 300)) < 0.9, b=rng.random((6, 300)) < 0.7)
    outside = made(a=rng.random((6, 200)) < 0.6, b=rng.random((6, 200)) < 0.7)
    found = shifted(inside, outside)
    assert found["a"]["drop"]["difference"] == pytest.approx(inside.of["a"].mean() - outside.of["a"].mean())
    assert found["a"]["drop"]["low"] > 0.15
    assert found["b"]["drop"]["low"] < 0 < found["b"]["drop"]["high"]


def test_a_drop_under_corruption_is_paired_by_item():
    """Each item loses exactly 0.1: however much items differ, the drop is known exactly."""
    clean = made(a=np.tile(np.linspace(0, 1, 50), (6, 1)))
    spoiled = Scores({"a": clean.of["a"][:, [3, 1, 2]] - 0.1}, clean.seeds, ("3", "1", "2"))
    drop = corrupted(clean, spoiled)["a"]["drop"]
    assert drop["difference"] == pytest.approx(0.1)
    assert drop["high"] - drop["low"] < 1e-6


def test_what_was_forgotten_is_measured_from_the_bare_base():
    items = [{"item": "0", "prediction": 20.0, "label": 10}, {"item": "1", "prediction": 10.0, "label": 10}]
    scores = made(untrained=np.tile([[-1.0, -0.5]], (3, 1)), full=np.tile([[-2.0, -1.0]], (3, 1)))
    found = forgotten(
        scores, {"untrained": [{"items": items}], "full": [{"items": items}, None]}, "perplexity"
    )
    assert found["full"]["lost"]["difference"] == pytest.approx(0.75)
    assert found["untrained"]["lost"] is None
    assert found["full"]["perplexity"]["mean"] == pytest.approx(np.exp(30 / 20))
    assert forgotten(made(full=np.ones((3, 2))), {}, "probe") == {}


# -- in a comparison ---------------------------------------------------------------------------------


class Wider(FakeTrainer):
    """A fake trainer with groups, probabilities, a shifted set and a corrupted copy of the test split."""

    def __init__(self, **options):
        super().__init__(**options)
        x, y = self.data["test"]
        rng = np.random.default_rng(11)
        self.data["shifted-far"] = (rng.standard_normal((200, 10)), rng.integers(0, 2, 200))
        self.data["corrupted-noise-3"] = (x + 2 * rng.standard_normal(x.shape), y)
        self.data["corrupted-blur-3"] = (x / 2, y)
        self.data[TRAIN_SAMPLE] = tuple(part[:100] for part in self.data["train"])
        rows = {name: [{}] for name in (*list(self.data)[3:],)}
        about = {
            "shifted-far": {"kind": "shifted", "name": "far"},
            "corrupted-noise-3": {"kind": "corrupted", "name": "noise", "severity": 3},
            "corrupted-blur-3": {"kind": "corrupted", "name": "blur", "severity": 3},
            "forgetting-none": {"kind": "forgetting", "name": "none", "not_applicable": "for a reason"},
        }
        groups = {f"test-{i}": "many" if x[i, 9] < 1 else "few" for i in range(len(y))}
        self.beyond = Further(rows, {}, about, groups, "kind")

    def __call__(self, **job):
        result = super().__call__(**job)
        for lines in result.predictions.values():
            for line in lines:
                line["item"] = (
                    line["item"].replace("corrupted-noise-3", "test").replace("corrupted-blur-3", "test")
                )
                line["prediction"], line["label"] = str(line["prediction"]), str(line["label"])
                line["probabilities"] = {line["prediction"]: 0.8, str(1 - int(line["prediction"])): 0.2}
        return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wider")
    options = {"rates": RATES, "budget": "demo", "sizes": SIZES, "progress": None}
    result = compare("m", "d", ["lora:rank=1", "broken"], output=folder, run_arm=Wider(), **options)
    return folder, result.to_dict()


def test_every_confirmed_run_is_scored_on_every_set_and_no_trial_is(finished):
    trainer = Wider()
    options = {"rates": RATES, "budget": "demo", "sizes": SIZES, "progress": None, "seeds": 2}
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        compare("m", "d", ["lora:rank=1"], output=folder, run_arm=trainer, **options)
    confirmed = {splits for *_, splits in trainer.calls if "test" in splits}
    assert confirmed == {("validation", "test", *trainer.beyond)}
    assert {splits for *_, splits in trainer.calls if "test" not in splits} == {("validation",)}


def test_further_scores_are_sealed_with_the_test_split(finished):
    folder, _ = finished
    sealed = json.loads((folder / "sealed" / "full" / "seed-1.json").read_text())
    assert set(sealed["further"]) == {"shifted-far", "corrupted-noise-3", "corrupted-blur-3"}
    assert {"confidence", "brier", "group"} <= set(sealed["items"][0])
    ledger = (folder / "ledger.jsonl").read_text()
    assert "shifted-far-0" not in ledger
    path = folder / "sealed" / "full" / "seed-1.json"
    text = path.read_text()
    path.write_text(text.replace('"shifted-far-7","', '"shifted-far-7" ,"'))
    options = {"rates": RATES, "budget": "demo", "sizes": SIZES, "progress": None}
    with pytest.raises(BadData, match="not those that the ledger recorded"):
        compare("m", "d", ["lora:rank=1", "broken"], output=folder, run_arm=Wider(), **options)
    path.write_text(text)


def test_summary_has_a_section_for_each(finished):
    _, summary = finished
    assert set(summary["shifted"]) == {"shifted-far"}
    far = summary["shifted"]["shifted-far"]["arms"]
    assert far["full"]["drop"]["low"] > 0.1  # the labels of the far set are coins
    assert set(summary["corrupted"]) == {"corrupted-noise-3", "corrupted-blur-3", "all"}
    noise = summary["corrupted"]["corrupted-noise-3"]["arms"]
    assert noise["full"]["drop"]["low"] > 0
    assert (
        noise["broken"]["drop"]["difference"] == noise["untrained"]["drop"]["difference"]
    )  # chance, as on test
    both = summary["corrupted"]["all"]["arms"]["full"]["mean"]
    assert both == pytest.approx(
        np.mean([summary["corrupted"][f"corrupted-{k}-3"]["arms"]["full"]["mean"] for k in ("noise", "blur")])
    )
    assert summary["forgetting"]["forgetting-none"] == {
        "kind": "forgetting",
        "name": "none",
        "not_applicable": "for a reason",
    }
    groups = summary["by_group"]
    assert groups["column"] == "kind"
    assert {row["group"] for row in groups["arms"]["full"]["groups"]} == {"few", "many"}
    found = summary["calibration"]["full"]
    accuracy = next(arm["mean"] for arm in summary["arms"] if arm["arm"] == "full")
    assert found["overconfidence"]["mean"] == pytest.approx(0.8 - accuracy)
    assert "broken" not in summary["calibration"]
    assert summary["stability"]["full"]["deviation"] > 0
    assert summary["stability"]["full"]["train_validation_gap"]["mean"] is not None
    assert summary["comparison"]["beyond"]["groups"] == "kind"


def test_a_comparison_that_asks_for_nothing_more_has_no_such_section(tmp_path):
    options = {"rates": RATES, "budget": "demo", "sizes": SIZES, "progress": None, "seeds": 2}
    summary = compare("m", "d", ["lora:rank=1"], output=tmp_path, run_arm=FakeTrainer(), **options).to_dict()
    assert not {"shifted", "corrupted", "forgetting", "by_group", "calibration"} & set(summary)


def test_results_made_elsewhere_have_groups_and_calibration_where_their_lines_say_so(finished, tmp_path):
    folder, summary = finished
    found = from_results(folder / "scores.jsonl", output=tmp_path, metric="accuracy").to_dict()
    assert found["by_group"]["arms"]["full"] == summary["by_group"]["arms"]["full"]
    assert found["calibration"]["full"]["error"] == summary["calibration"]["full"]["error"]
    assert found["calibration"]["full"]["brier"] is None
    lines = [{"arm": arm, "seed": seed, "item": i, "score": (i % 7) / 7 + 0.01 * seed, "group": "ab"[i % 2]}
             for arm in "xy" for seed in range(3) for i in range(80)]  # fmt: skip
    path = tmp_path / "errors.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    errors = from_results(path, output=tmp_path / "e", higher_is_better=False).to_dict()["by_group"]["arms"][
        "x"
    ]
    assert all(row["low"] < row["mean"] < row["high"] and row["mean"] > 0 for row in errors["groups"])
    assert errors["worst"]["mean"] == max(row["mean"] for row in errors["groups"])


# -- reading what is asked for -----------------------------------------------------------------------


def texts(count, start=0, **more):
    return [
        {"text": f"sentence {i + start} says {(i + start) * 7}", "label": "ab"[i % 2], **more}
        for i in range(count)
    ]


@pytest.fixture
def data():
    from veneer.data import read

    return read(
        {"train": texts(20), "validation": texts(8, 100), "test": texts(8, 200, place="north")},
        task="classify",
    )


def test_a_shifted_file_is_read_whole_for_the_same_labels_and_copies_of_known_rows_are_left_out(
    data, tmp_path
):
    path = tmp_path / "other place.csv"
    lines = [*texts(10, 500), *texts(2, 0)]
    path.write_text("text,label\n" + "\n".join(f"{row['text']},{row['label']}" for row in lines))
    found = further_of(data, {"shifted": [str(path)], "groups": "place"})
    (name,) = found.rows
    assert name == "shifted-other-place"
    assert len(found.rows[name]) == 10
    assert found.about[name]["copies_left_out"] == 2
    assert set(found.groups.values()) == {"north"}
    again = further_of(data, {"shifted": [str(path)]})
    assert again.about[name]["sha256"] == found.about[name]["sha256"]
    path.write_text("text,label\n" + "\n".join(f"{row['text']},{row['label']}" for row in texts(6, 0)))
    with pytest.raises(BadData, match="6 rows, of which 6 stand in the data"):
        further_of(data, {"shifted": [str(path)]})
    path.write_text("text,label\nsomething else here,c\nand more of it,a")
    with pytest.raises(BadData, match="not among the labels"):
        further_of(data, {"shifted": str(path)})


def test_corrupted_copies_keep_labels_and_order(data):
    found = further_of(data, {"corrupt": "typos:2,drops"})
    assert list(found.rows) == ["corrupted-typos-2", "corrupted-drops-3"]
    for rows in found.rows.values():
        assert [row["label"] for row in rows] == [row["label"] for row in data.test]
        assert all(row["text"] != clean["text"] for row, clean in zip(rows, data.test))
    assert found.to_dict()["sets"]["corrupted-drops-3"]["severity"] == 3


def test_pictures_are_corrupted_too_and_the_digest_sees_every_value():
    from veneer.data import read

    def pictures(count, start=0):
        rng = np.random.default_rng(start)
        return [
            {"image": rng.integers(0, 255, (28, 28, 3), dtype=np.uint8), "label": "ab"[i % 2]}
            for i in range(count)
        ]

    parts = {"train": pictures(12), "validation": pictures(4, 1), "test": pictures(6, 2)}
    found = further_of(read(parts, task="image-classify"), {"corrupt": "noise:1,occlusion"})
    assert list(found.rows) == ["corrupted-noise-1", "corrupted-occlusion-3"]
    before = found.about["corrupted-occlusion-3"]["sha256"]
    parts["test"][3]["image"][14, 14, 0] ^= (
        255  # one value in the middle, which the text of an array leaves out
    )
    again = further_of(read(parts, task="image-classify"), {"corrupt": "noise:1,occlusion"})
    assert again.about["corrupted-noise-1"]["sha256"] != found.about["corrupted-noise-1"]["sha256"]
    assert len(before) == 64
