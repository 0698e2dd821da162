"""`compare` from end to end with a fake trainer: the protocol, the files, kills, and what must not matter."""

from __future__ import annotations

import json

import pytest

from test_comparing_fake import RATES, SIZES, FakeTrainer
from veneer.comparing import compare, from_results, parse_arm
from veneer.comparing.run import choose_rate
from veneer.errors import BadData, BadOption, TrainingFailed, UnknownMethod

ARMS = ["lora:rank=1", "lora:rank=4"]


def run(folder, arms=ARMS, trainer=None, **options):
    given = {"rates": RATES, "budget": "demo", "sizes": SIZES, "progress": None} | options
    return compare("builtin:m", "builtin:d", arms, output=folder, run_arm=trainer or FakeTrainer(), **given)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(folder):
    """summary.json less the seconds that trials took, which no two runs share."""
    summary = json.loads((folder / "summary.json").read_text())
    summary["fronts"].pop("tuning_seconds")
    for costs in summary["costs"]["arms"].values():
        costs["tuning_seconds"] = costs["run_seconds"] = None
    return summary


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    trainer = FakeTrainer()
    return run(folder, [*ARMS, "broken", "impossible"], trainer), trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def test_all_files_are_there_with_the_fields_that_are_promised(finished):
    result, _ = finished
    rows = lines(result.folder / "results.jsonl")
    fields = """arm method seed status reason metric value trainable_parameters bytes_on_disk
        peak_memory_bytes step_seconds tokens_per_second learning_rate settings"""
    assert set(fields.split()) <= set(rows[0])
    summary = json.loads((result.folder / "summary.json").read_text())
    assert {"arm", "mean", "low", "high", "tied_with_best", "p_adjusted", "on_front"} <= set(
        summary["arms"][0]
    )
    assert summary["recommendation"]["arm"] == result.best
    assert len({row["design"] for row in rows} | {summary["design"], result.design.sha256}) == 1
    assert (result.folder / "report.html").read_text().startswith("<!doctype html>")
    assert (result.folder / "best" / "weights.txt").exists()
    assert json.loads((result.folder / "best" / "comparison.json").read_text())["arm"] == result.best


def test_the_controls_are_always_among_the_arms(finished):
    result, _ = finished
    arms = {row["arm"] for row in lines(result.folder / "results.jsonl")}
    assert {"untrained", "linear_probe", "full", *ARMS} <= arms


def test_every_arm_has_the_same_trials_and_the_same_new_seeds(finished):
    _, trainer = finished
    tuned, confirmed = {}, {}
    for arm, seed, rate, splits in trainer.calls:
        if splits == ("validation",):
            tuned.setdefault(arm, []).append((seed, rate))
        else:
            confirmed.setdefault(arm, []).append(seed)
    for arm in ("linear_probe", "full", *ARMS):
        assert [seed for seed, _ in tuned[arm]] == [0, 0, 0]
        assert confirmed[arm] == [1, 2, 3, 4, 5, 6]
    assert "untrained" not in tuned
    assert confirmed["untrained"] == [1]


def test_divergence_is_a_result_at_chance(finished):
    result, _ = finished
    rows = lines(result.folder / "results.jsonl")
    broken = [row for row in rows if row["arm"] == "broken"]
    chance = next(row["value"] for row in rows if row["arm"] == "untrained")
    assert [row["status"] for row in broken] == ["diverged"] * 6
    assert {row["value"] for row in broken} == {chance}
    assert "not finite" in broken[0]["reason"]
    assert not result.analysis.arm("broken").tied_with_best


def test_an_arm_that_cannot_exist_is_listed_with_its_reason(finished):
    result, trainer = finished
    row = next(row for row in lines(result.folder / "results.jsonl") if row["arm"] == "impossible")
    assert row["status"] == "not_applicable"
    assert row["reason"] == "this base has no attention."
    assert row["value"] is None
    assert sum(arm == "impossible" for arm, *_ in trainer.calls) == 1
    assert "impossible: not applicable" in result.table


def test_best_holds_the_seed_with_the_highest_validation_score(finished):
    result, _ = finished
    rows = [row for row in result.rows if row["arm"] == result.best]
    wanted = max(rows, key=lambda row: (row["validation"], -row["seed"]))["seed"]
    arm, seed, *_ = (result.folder / "best" / "weights.txt").read_text().split()
    assert (arm, int(seed)) == (result.best, wanted)


def test_only_the_best_folder_of_each_arm_stays(finished):
    result, _ = finished
    kept = [path.name for path in (result.folder / "runs").glob("lora*/*")]
    assert len(kept) == 2
    assert all(name.startswith("seed-") for name in kept)


def test_test_predictions_stay_in_no_folder_but_the_sealed_one(finished):
    result, _ = finished
    assert not list(result.folder.rglob("predictions-test.jsonl"))
    assert len(list((result.folder / "sealed").glob("*/*.json"))) == 4 * 6 + 1
    ledger = (result.folder / "ledger.jsonl").read_text()
    assert "test-0" not in ledger
    assert '"prediction"' not in ledger


def test_the_table_prints_and_names_the_budget(finished):
    result, _ = finished
    assert "demonstration budget: a screen, no claims" in result.table
    assert "seeds" in str(result)
    header, rule, *_ = result.table.splitlines()
    assert len(rule) >= len(header.rstrip())
    assert all(arm.arm in result.table for arm in result.analysis.arms)


def test_the_same_call_again_runs_nothing_and_reads_the_test_split_no_second_time(finished):
    result, _ = finished
    before = (result.folder / "summary.json").read_text()
    idle = FakeTrainer(stop_after=0)  # would die in its first run
    again = run(result.folder, [*ARMS, "broken", "impossible"], idle)
    assert again.test_reads == 1
    assert (result.folder / "summary.json").read_text() == before


@pytest.mark.parametrize("stop_after", [0, 3, 20])
def test_a_killed_comparison_goes_on_to_the_same_result(tmp_path, whole, stop_after):
    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        run(part, trainer=FakeTrainer(stop_after=stop_after))
    with open(part / "ledger.jsonl", "a") as ledger:
        ledger.write('{"kind": "run", "arm": "lo')  # the line that the kill tore
    rest = FakeTrainer()
    run(part, trainer=rest)
    assert len(rest.calls) == 37 - stop_after
    for name in ("results.jsonl", "scores.jsonl"):
        assert (part / name).read_text() == (whole / name).read_text()
    assert without_times(part) == without_times(whole)


def test_another_design_in_the_same_folder_is_an_error_that_names_the_difference(tmp_path):
    run(tmp_path)
    with pytest.raises(BadOption, match=r"differ in budget|differ in .*smallest_effect"):
        run(tmp_path, smallest_effect=0.05)
    with pytest.raises(BadOption, match="differ in arms"):
        run(tmp_path, [*ARMS, "lora:rank=2"])


def test_adding_an_arm_runs_only_what_is_new_and_counts_the_second_read(tmp_path):
    run(tmp_path)
    trainer = FakeTrainer()
    result = run(tmp_path, [*ARMS, "lora:rank=2"], trainer, extend=True)
    assert {arm for arm, *_ in trainer.calls} == {"lora:rank=2"}
    assert result.test_reads == 2
    assert result.to_dict()["test_reads"] == 2


def test_reordering_or_renaming_arms_changes_no_score(tmp_path, whole):
    def scores(folder):
        return {(x["arm"], x["seed"], x["item"]): x["score"] for x in lines(folder / "scores.jsonl")}

    other = run(tmp_path / "order", ARMS[::-1])
    assert scores(other.folder) == scores(whole)

    class Renames(FakeTrainer):
        def __call__(self, *, arm, **job):
            return super().__call__(arm=parse_arm(str(arm).replace("zebra", "lora")), **job)

    renamed = run(
        tmp_path / "name",
        [arm.replace("lora", "zebra") for arm in ARMS],
        Renames(),
        rates={**RATES, "zebra": RATES["lora"]},
    )
    assert {
        (a.replace("zebra", "lora"), *rest): s for (a, *rest), s in scores(renamed.folder).items()
    } == scores(whole)


def test_flipping_the_test_labels_changes_neither_rates_nor_best(tmp_path):
    """The recommended arm may change, since test ranks arms; the rates and each arm's seed may not."""
    one, two = run(tmp_path / "a"), run(tmp_path / "b", trainer=FakeTrainer(flip_test=True))
    chosen = [{(row["arm"], row["learning_rate"]) for row in result.rows} for result in (one, two)]
    assert chosen[0] == chosen[1]
    kept = [
        sorted(str(path.relative_to(result.folder)) for path in (result.folder / "runs").glob("*/*"))
        for result in (one, two)
    ]
    assert kept[0] == kept[1]
    means = [{arm.arm: arm.interval.estimate for arm in result.analysis.arms} for result in (one, two)]
    assert means[0]["full"] == pytest.approx(1 - means[1]["full"])


def test_shuffled_training_labels_leave_every_arm_at_chance(tmp_path):
    result = run(tmp_path, trainer=FakeTrainer(shuffle=True))
    assert all(arm.interval.low < 0.55 for arm in result.analysis.arms)
    assert result.analysis.arm("full").interval.estimate < 0.62


def test_ties_go_to_the_smaller_rate_and_divergence_loses():
    def trial(rate, value, status="ok"):
        return {"learning_rate": rate, "validation": value, "status": status}

    assert choose_rate([trial(1.0, 0.8), trial(0.1, 0.8), trial(0.01, 0.7)]) == 0.1
    assert choose_rate([trial(1.0, 0.8), trial(0.1, 0.4)], higher_is_better=False) == 0.1
    assert choose_rate([{"learning_rate": 1.0, "status": "diverged"}, trial(0.1, 0.2)]) == 0.1
    noisy = [trial(1.0, 0.9), trial(1.0, 0.5), trial(0.1, 0.8), trial(0.1, 0.8)]
    assert choose_rate(noisy) == 0.1  # the mean over tuning seeds


def test_the_best_on_an_edge_is_followed_as_far_as_the_allowance_goes(tmp_path):
    trainer = FakeTrainer()
    run(tmp_path, ["lora:rank=4"], trainer, rates={**RATES, "lora": (0.001, 0.003, 0.01)}, extend_rates=2)
    tried = [rate for arm, _, rate, splits in trainer.calls if arm == "lora:rank=4" and len(splits) == 1]
    assert tried == [0.001, 0.003, 0.01, 0.0333, 0.111]


def test_a_failure_is_tried_again_and_a_changed_sealed_file_is_refused(tmp_path):
    class Fails(FakeTrainer):
        def __call__(self, **job):
            if str(job["arm"]) == "lora:rank=4":
                raise RuntimeError("CUDA error")
            return super().__call__(**job)

    first = run(tmp_path, trainer=Fails())
    assert first.to_dict()["not_measured"] == [
        {"arm": "lora:rank=4", "status": "failed", "reason": "RuntimeError: CUDA error"}
    ]
    second = run(tmp_path)
    assert second.to_dict()["not_measured"] == []
    sealed = tmp_path / "sealed" / "full" / "seed-1.json"
    sealed.write_text(sealed.read_text().replace('"score":0.0', '"score":1.0'))
    with pytest.raises(BadData, match="not those that the ledger recorded"):
        run(tmp_path)


def test_a_second_process_in_the_folder_is_refused(tmp_path):
    import subprocess
    import sys

    from veneer.comparing.running.ledger import locked

    with locked(tmp_path):
        code = (
            "from veneer.comparing.running.ledger import locked\n"
            "from veneer.errors import TrainingFailed\n"
            "try:\n"
            f"    with locked({str(tmp_path)!r}): print('held')\n"
            "except TrainingFailed as error: print(error)"
        )
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "another comparison is running" in said


def test_where_nothing_can_be_measured_the_error_names_the_reasons(tmp_path):
    class Fails(FakeTrainer):
        def __call__(self, **job):
            raise RuntimeError("no disk")

    with pytest.raises(TrainingFailed, match="untrained: RuntimeError: no disk"):
        run(tmp_path, trainer=Fails())


def test_an_unknown_method_is_named_before_anything_runs(tmp_path):
    trainer = FakeTrainer()
    with pytest.raises(UnknownMethod, match="lorra"):
        run(tmp_path, ["lorra"], trainer, known_methods=["lora", "dora"])
    assert not trainer.calls


def test_scores_of_a_comparison_give_the_same_statistics_from_their_file(tmp_path):
    result = run(tmp_path / "run")
    again = from_results(result.folder / "scores.jsonl", output=tmp_path / "again", metric="accuracy")
    pick = ("arm", "mean", "low", "high", "tied_with_best", "p_adjusted", "front_probability")
    one, two = ([{k: arm[k] for k in pick} for arm in r.to_dict()["arms"]] for r in (result, again))
    assert one == two
    assert again.best == result.best
    assert not (tmp_path / "again" / "best").exists()


def test_results_from_elsewhere_may_have_one_seed_and_a_score_that_falls(tmp_path):
    path = tmp_path / "loss.csv"
    rows = [f"{arm},{i},{(i % 7) * scale}" for arm, scale in (("a", 1.0), ("b", 2.0)) for i in range(40)]
    path.write_text("arm,item,score\n" + "\n".join(rows))
    result = from_results(path, higher_is_better=False)
    summary = result.to_dict()
    assert result.best == "a"
    assert summary["items_only"]
    assert "One seed" in result.sentence
    best = summary["arms"][0]
    assert best["low"] < best["mean"] < best["high"]
    assert best["mean"] == pytest.approx(sum((i % 7) for i in range(40)) / 40)
    assert (tmp_path / "loss-compared" / "report.html").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"arm": "a", "seed": 1, "item": "1"}\n', "line 1: no 'score'"),
        ('{"arm": "a", "item": "1", "score": "x"}\n', "expected a finite number"),
        (
            '{"arm": "a", "item": "1", "score": 1}\n{"arm": "a", "item": "1", "score": 0}\n',
            "line 2: item '1'",
        ),
        ("not json\n", "line 1: not JSON"),
        ("", "it is empty"),
        (
            "".join(f'{{"arm": "{a}", "item": "{i}", "score": 1}}\n' for a, i in ("a1", "a2", "b1", "b3")),
            "other test items",
        ),
    ],
)
def test_bad_results_are_named_with_their_lines(tmp_path, text, said):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(BadData) as caught:
        from_results(path)
    assert said in str(caught.value)


def test_the_forecast_is_said_before_the_first_run(tmp_path):
    said = []

    class Listens(FakeTrainer):
        def __call__(self, **job):
            said.append("run")
            return super().__call__(**job)

    run(tmp_path, trainer=Listens(), progress=lambda event: said.append(event.message))
    before = "\n".join(said[: said.index("run")])
    assert "smallest effect it can find (power 0.8" in before
    assert "37 runs: 12 for learning rates, 25 to confirm" in before
    assert any("test split read 1 time" in message for message in said)
