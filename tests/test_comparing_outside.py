"""Results made elsewhere: every form in which people have them, and what is said where less is known."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from scipy import stats

from veneer.comparing import from_results
from veneer.errors import BadData, UnknownName, UnknownOption


def item_rows(arms=("lora", "dora"), seeds=3, items=80, gain=0.5):
    """Lines of right-or-wrong scores; the second arm is better."""
    rng = np.random.default_rng(0)
    hard = rng.standard_normal(items)
    for place, arm in enumerate(arms):
        for seed in range(seeds):
            right = 0.3 + gain * place + hard + rng.standard_normal(items) > 0
            for item in range(items):
                yield {"arm": arm, "seed": seed, "item": f"q{item}", "score": float(right[item])}


def write_csv(path, rows):
    rows = list(rows)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def renamed(rows, names):
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]


def numbers(result):
    return [(arm.arm, arm.interval, arm.p_adjusted) for arm in result.analysis.arms]


def test_every_table_of_the_same_scores_gives_the_same_analysis(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = list(item_rows())
    other = renamed(rows, {"arm": "model", "score": "correct", "item": "id", "seed": "run"})
    columns = {"arm": "model", "score": "correct", "item": "id", "seed": "run"}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_csv(tmp_path / "b.csv", other)
    parquet.write_table(arrow.Table.from_pylist(other), tmp_path / "c.parquet")
    expected = numbers(from_results(tmp_path / "a.jsonl"))
    assert numbers(from_results(tmp_path / "b.csv", columns=columns)) == expected
    assert numbers(from_results(tmp_path / "c.parquet", columns=columns)) == expected
    assert expected[0][0] == "dora"


def test_a_file_for_each_run_is_read_by_the_names_in_its_path(tmp_path):
    rows = list(item_rows())
    for arm in ("lora", "dora"):
        for seed in range(3):
            folder = tmp_path / arm / f"seed-{seed}"
            folder.mkdir(parents=True)
            mine = [row for row in rows if row["arm"] == arm and row["seed"] == seed]
            write_csv(folder / "scores.csv", [{"score": row["score"]} for row in mine])
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = from_results(str(tmp_path / "{arm}" / "seed-{seed}" / "scores.csv"), output=tmp_path / "out")
    assert numbers(found) == numbers(from_results(tmp_path / "all.jsonl"))
    several = [
        tmp_path / arm / f"seed-{seed}" / "scores.csv" for arm in ("lora", "dora") for seed in range(3)
    ]
    with pytest.raises(BadData, match="no 'arm'"):
        from_results(several)
    with pytest.raises(BadData, match="no file fits"):
        from_results(str(tmp_path / "{arm}" / "none-{seed}.csv"))


def test_labels_and_predictions_stand_in_for_scores(tmp_path):
    rows = [
        {"arm": arm, "item": i, "label": "yes", "prediction": "yes" if i % 3 or arm == "b" else "no"}
        for arm in "ab"
        for i in range(30)
    ]
    found = from_results(write_csv(tmp_path / "p.csv", rows))
    assert found.analysis.arm("a").interval.estimate == pytest.approx(20 / 30)


def test_saved_predictions_of_a_trainer_are_scored_item_by_item(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    for name, skill in (
        ("lora-seed-1", 1.0),
        ("lora-seed-2", 1.0),
        ("full-seed-1", 3.0),
        ("full-seed-2", 3.0),
    ):
        logits = rng.standard_normal((60, 3))
        logits[np.arange(60), labels] += skill
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "predictions.npz", predictions=logits, label_ids=labels)
    found = from_results(str(tmp_path / "*" / "predictions.npz"), output=tmp_path / "out", metric="accuracy")
    assert found.best == "full"
    assert found.analysis.items == 60
    assert found.analysis.seeds == 2
    np.savez(tmp_path / "lora-seed-1" / "predictions.npz", predictions=logits)
    with pytest.raises(BadData, match="no array 'label_ids'"):
        from_results(tmp_path / "lora-seed-1" / "predictions.npz")


def write_state(folder, values, kind="trainer_state.json"):
    folder.mkdir(parents=True)
    log = [
        {"eval_accuracy": v, "eval_loss": 1 - v, "eval_runtime": 3.0, "step": s} for s, v in enumerate(values)
    ]
    (folder / kind).write_text(json.dumps({"log_history": log, "best_metric": None}))


def test_trainer_states_give_one_number_a_run_and_the_t_test_over_seeds(tmp_path):
    lora, full = [0.80, 0.83, 0.79, 0.82], [0.86, 0.90, 0.84, 0.88]
    for arm, values in (("lora", lora), ("full", full)):
        for seed, value in enumerate(values):
            write_state(tmp_path / arm / f"seed-{seed}", [0.5, value])
    found = from_results(
        str(tmp_path / "*" / "*" / "trainer_state.json"), output=tmp_path / "out", metric="accuracy"
    )
    contrast = found.analysis.contrasts[0]
    assert contrast.difference.estimate == pytest.approx(np.mean(full) - np.mean(lora))
    assert contrast.difference.p_value == pytest.approx(stats.ttest_rel(full, lora).pvalue, rel=1e-4)
    said = " ".join(found.to_dict()["notes"])
    assert "hold for these test items" in said
    assert "evaluation split" in said
    assert "hold for these test items" in found.report.read_text()
    assert "test items and" not in found.sentence
    again = from_results(tmp_path / "out" / "scores.jsonl", output=tmp_path / "again")
    assert numbers(again) == numbers(found)


def test_a_loss_is_better_where_it_is_lower(tmp_path):
    for arm, values in (("good", [0.9, 0.91]), ("bad", [0.6, 0.63])):
        for seed, value in enumerate(values):
            write_state(tmp_path / f"{arm}-seed{seed}", [value])
    found = from_results(str(tmp_path / "*" / "trainer_state.json"), output=tmp_path / "out", metric="loss")
    assert found.analysis.best == "good"
    with pytest.raises(UnknownName, match="no 'f1'"):
        from_results(tmp_path / "bad-seed0" / "trainer_state.json", metric="f1")


def peft_file(folder, name, accuracy, status="success"):
    """The fields of a result file of PEFT's method comparison that are read."""
    folder.mkdir(exist_ok=True)
    content = {
        "run_info": {
            "experiment_name": name,
            "train_config": {"seed": 0, "max_steps": 5000},
            "error_msg": "",
        },
        "train_info": {
            "status": status,
            "num_trainable_params": 9175040,
            "file_size": 36715216,
            "accelerator_memory_max": 22 * 2**30,
            "train_time": 1800.0,
            "metrics": [
                {"step": 250, "valid accuracy": 0.4},
                {"step": 5000, "test accuracy": accuracy, "train total tokens": 4198051, "forgetting": 0.1},
            ],
        },
        "meta_info": {"dataset_info": {"gsm8k": {"sha": "1"}}},
    }
    (folder / f"{name.replace('/', '--')}.json").write_text(json.dumps(content))


def test_files_of_the_benchmark_of_peft_say_what_one_run_can_say(tmp_path):
    folder = tmp_path / "results"
    right = {"lora/rank32": 640, "dora/rank32": 650, "ia3/default": 480}
    for name, number in right.items():
        peft_file(folder, name, number / 1319)
    peft_file(folder, "broken/default", 0.0, status="failed")
    found = from_results(folder, output=tmp_path / "out")
    ordered = [arm.arm for arm in found.analysis.arms]
    assert ordered == ["dora/rank32", "lora/rank32", "ia3/default"]
    best, close, far = found.analysis.arms
    assert best.tied_with_best
    assert close.tied_with_best
    assert not far.tied_with_best
    share = 650 / 1319
    half = stats.norm.ppf(0.975) * (share * (1 - share) / 1319) ** 0.5
    assert best.interval.high == pytest.approx(share + half, rel=1e-6)
    assert best.interval.items_only
    summary = found.to_dict()
    assert summary["items"] == 1319
    assert summary["metric"] == "test accuracy"
    assert [other["arm"] for other in summary["not_measured"]] == ["broken/default"]
    assert any("one number a run and one seed" in note for note in summary["notes"])
    assert summary["arms"][0]["trainable_parameters"] == 9175040
    assert summary["arms"][0]["step_seconds"] == pytest.approx(0.36)


def test_one_run_without_items_is_refused_unless_their_number_is_given(tmp_path):
    path = write_csv(tmp_path / "t.csv", [{"arm": "a", "score": 0.8}, {"arm": "b", "score": 0.9}])
    with pytest.raises(BadData, match="luck"):
        from_results(path)
    found = from_results(path, items=500)
    assert found.analysis.arms[0].arm == "b"
    assert not found.analysis.arms[1].tied_with_best
    path = write_csv(tmp_path / "u.csv", [{"arm": "a", "score": 80}, {"arm": "b", "score": 90}])
    with pytest.raises(BadData, match="between 0 and 1"):
        from_results(path, items=500)


def test_unpaired_shares_keep_their_coverage_and_are_wider_than_paired_ones():
    from veneer.comparing.inference.statistics import difference, spread_of_run_difference

    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        hard = rng.standard_normal(300)
        one, two = (((0.3 + hard + rng.standard_normal((3, 300))) > 0).astype(float) for _ in range(2))
        found = spread_of_run_difference(one.mean(1), two.mean(1), 300)
        half = float(found.half_width(0.025))
        held += abs(float(found.estimate)) <= half
    assert half > difference(one, two).high - difference(one, two).estimate
    assert held / 400 > 0.95


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"score": "high"}, "line 3: 'correct' is 'high', expected a finite number"),
        ({"score": "nan"}, "line 3: 'correct' is 'nan'"),
        ({"score": ""}, "line 3: no 'correct'"),
        ({"arm": ""}, "line 3: no 'arm'"),
        ({"item": "q0"}, "line 3: item 'q0' is there twice"),
        ({"step_seconds": "fast"}, "line 3: 'step_seconds' is 'fast'"),
    ],
)
def test_a_mistake_is_named_by_line_and_column(tmp_path, row, said):
    rows = [{"arm": "a", "seed": 1, "item": f"q{i}", "score": 1.0, "step_seconds": ""} for i in range(4)]
    rows[1] |= row
    path = write_csv(tmp_path / "t.csv", renamed(rows, {"score": "correct"}))
    with pytest.raises(BadData, match=said.replace("(", r"\(")) as raised:
        from_results(path, columns={"score": "correct"})
    assert "t.csv" in str(raised.value)


def test_names_of_columns_are_looked_up(tmp_path):
    path = write_csv(tmp_path / "t.csv", item_rows())
    with pytest.raises(UnknownName, match="no column 'scor'") as raised:
        from_results(path, columns={"score": "scor"})
    assert "score" in str(raised.value)
    with pytest.raises(UnknownOption, match="no role 'method'"):
        from_results(path, columns={"method": "arm"})


def test_several_files_are_one_comparison_and_no_run_is_there_twice(tmp_path):
    rows = list(item_rows())
    one = write_csv(tmp_path / "one.csv", [row for row in rows if row["arm"] == "lora"])
    two = write_csv(tmp_path / "two.csv", [row for row in rows if row["arm"] == "dora"])
    whole = write_csv(tmp_path / "whole.csv", rows)
    assert numbers(from_results([one, two])) == numbers(from_results(whole))
    with pytest.raises(BadData, match=r"is in .*one.csv.* and in .*whole.csv"):
        from_results([one, whole])


def test_runs_with_and_without_items_do_not_mix(tmp_path):
    one = write_csv(tmp_path / "one.csv", item_rows(arms=("lora",)))
    two = write_csv(tmp_path / "two.csv", [{"arm": "full", "score": 0.9}])
    with pytest.raises(BadData, match="one for a whole run"):
        from_results([one, two])


def test_the_command_reads_patterns_and_other_names(tmp_path):
    from typer.testing import CliRunner

    from veneer.cli._app import app

    path = write_csv(tmp_path / "t.csv", renamed(item_rows(), {"arm": "model"}))
    done = CliRunner().invoke(
        app,
        [
            "compare",
            "--from",
            str(path),
            "--columns",
            "arm=model",
            "--output",
            str(tmp_path / "out"),
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["arms"][0]["arm"] == "dora"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.json", '{"run_info": {}, "train_info": {"status": "success"}}', "has no 'experiment_name'"),
        ("w.npz", "not an archive", "no archive of plain numpy arrays"),
        ("o.csv", "arm,item,score\na,1,1\na,2,0\n", "holds one arm, 'a'"),
        ("r.csv", "arm,item,score\na,1\n", "line 2: 2 fields where the header has 3"),
        ("n.json", "[1, 2]", "line 1: a int, not an object"),
    ],
)
def test_files_that_are_something_else_are_named(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(BadData) as raised:
        from_results(path)
    assert said in str(raised.value)
    assert name in str(raised.value)


def test_predictions_that_are_pickled_are_never_loaded(tmp_path):
    np.savez(tmp_path / "o.npz", predictions=np.array([{}, {}], dtype=object), label_ids=np.array([1, 0]))
    with pytest.raises(BadData, match="no archive of plain numpy arrays"):
        from_results(tmp_path / "o.npz")
