"""A comparison trains runs together where that gives what training them apart gives, and only there."""

import json
import sys

import pytest
import torch

from training_tiny import opened, saved_bert
from veneer.comparing import parse_budget
from veneer.comparing.planning.control_hooks import anchors_of, kept_norms
from veneer.comparing.planning.prepare import prepare
from veneer.comparing.run import run_prepared
from veneer.comparing.running import together as together_room
from veneer.comparing.running.runner import default_runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_bert(tmp_path_factory.mktemp("bert"))


QUESTION = {
    "methods": "lora:rank=2,linear_probe", "seeds": (1, 2), "trials": 2, "budget": "demo", "controls": "none",
    "batch_size": 8, "device": "cpu", "evaluate_batch_size": 32,
}  # fmt: skip


def lines(folder):
    found = {}
    for text in (folder / "ledger.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["kind"] == "run":
            found[line["stage"], line["arm"], line["seed"], line["learning_rate"]] = line
    return found


def compared(model, output, **options):
    prepared = prepare(model, opened(32, 16, 16), **{**QUESTION, **options})
    return run_prepared(prepared, output, costs=False, progress=lambda event: None)


@pytest.fixture
def cohorts(monkeypatch):
    """The arms of each cohort that was trained."""
    seen, plain = [], together_room._cohort

    def watched(runner, runs):
        seen.append([(str(r["arm"]), r["seed"]) for r in runs])
        return plain(runner, runs)

    monkeypatch.setattr(together_room, "_cohort", watched)
    return seen


@pytest.mark.slow
def test_the_ledger_is_what_runs_apart_write_and_a_stopped_comparison_goes_on(
    folder, tmp_path, cohorts, monkeypatch
):
    whole = compared(folder, tmp_path / "together", base_dropout=False)
    assert [len(c) for c in cohorts] == [4, 2, 2]  # trials of both arms; seeds of one, seeds of the other
    assert not any(arm.startswith("full") for cohort in cohorts for arm, _ in cohort)
    mine = lines(tmp_path / "together")
    assert {line["step_seconds"] for key, line in mine.items() if key[1] == "linear_probe"} == {None}, (
        "a cost"
    )

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["veneer.comparing.run"], "together", lambda run_arm, *rest: run_arm)
        apart = compared(folder, tmp_path / "apart", base_dropout=False)
    other = lines(tmp_path / "apart")
    assert mine.keys() == other.keys()
    for key, line in mine.items():
        assert line["validation"] == pytest.approx(other[key]["validation"], abs=1e-9), key
        assert line["trainable_parameters"] == other[key]["trainable_parameters"]
    assert [a["mean"] for a in whole.to_dict()["arms"]] == pytest.approx(
        [a["mean"] for a in apart.to_dict()["arms"]]
    )

    class Stopped(KeyboardInterrupt):
        pass

    def stop_at_fourth(event):
        if event.done == 4:
            raise Stopped

    cohorts.clear()
    prepared = prepare(folder, opened(32, 16, 16), **QUESTION, base_dropout=False)
    with pytest.raises(Stopped):
        run_prepared(prepared, tmp_path / "stopped", costs=False, progress=stop_at_fourth)
    first = sum(map(len, cohorts))
    compared(folder, tmp_path / "stopped", base_dropout=False)
    again = lines(tmp_path / "stopped")
    assert {k: v["validation"] for k, v in again.items()} == {k: v["validation"] for k, v in mine.items()}
    assert first < 8


def test_runs_are_apart_where_the_base_drops_or_an_arm_trains_much_or_is_no_ordinary_run(folder):
    from veneer.comparing import parse_arm

    def able(arm, **options):
        runner = default_runner(
            folder, opened(32, 16, 16), task=None, budget=parse_budget("demo"), options=options
        )
        return together_room.is_able(runner, parse_arm(arm))

    assert not able("lora:rank=2")
    assert able("lora:rank=2", base_dropout=False)
    assert not able("full", base_dropout=False)
    assert not able("untrained", base_dropout=False)
    assert not able("lora:rank=2+mezo", base_dropout=False)
    assert not able("lora:rank=2", base_dropout=False, mixed_precision="fp16")
    assert not able("lora:sites=no.such.site", base_dropout=False)
    assert together_room.members_at_once({"batch_size": 4}) == 16
    assert together_room.members_at_once({"batch_size": 16}) == 4
    assert together_room.members_at_once({"batch_size": 256}) == 1


def test_a_member_that_cannot_be_is_the_error_of_its_run_alone(folder, tmp_path, cohorts):
    from veneer.comparing import parse_arm

    runner = default_runner(
        folder, opened(32, 16, 16), task=None, budget=parse_budget("demo"), options={"base_dropout": False}
    )
    runs = [
        {
            "arm": parse_arm(arm),
            "seed": 0,
            "learning_rate": rate,
            "splits": ("validation",),
            "output": tmp_path / str(i),
        }
        for i, (arm, rate) in enumerate([("lora:rank=2", 1e-3), ("ia3", 1e30), ("ia3", 1e-3)])
    ]
    good, bad, also = together_room.train_runs(runner, runs)
    assert len(cohorts) == 1
    assert "not finite" in str(bad)
    assert good.metrics["validation"]["accuracy"] >= 0
    assert also.folder == str(tmp_path / "2")


@pytest.mark.parametrize("control", ["random_direction", "duplicate", "broken_scale"])
def test_a_control_in_a_cohort_is_what_it_is_by_itself(folder, tmp_path, cohorts, control):
    from safetensors.torch import load_file

    from veneer.comparing import parse_arm

    options = {"base_dropout": False, "device": "cpu", "batch_size": 8}
    runner = default_runner(
        folder, opened(32, 16, 16), task=None, budget=parse_budget("demo"), options=options
    )
    # Beside its anchor: what a control does to itself must not reach the others.
    arms = [("lora:rank=2", 1), (f"{control}:rank=2", 1), (f"{control}:rank=2", 2)]
    runs = [
        {"arm": parse_arm(arm), "seed": seed, "learning_rate": 2e-2, "splits": ("validation", "test")}
        for arm, seed in arms
    ]
    mine = together_room.train_runs(runner, [r | {"output": tmp_path / f"a{i}"} for i, r in enumerate(runs)])
    assert [len(c) for c in cohorts] == [3]
    for i, run in enumerate(runs):
        alone = runner(**run, output=tmp_path / f"b{i}")
        assert mine[i].trainable_parameters == alone.trainable_parameters
        one, two = (load_file(tmp_path / f"{x}{i}" / "adapter.safetensors") for x in "ab")
        assert one.keys() == two.keys()
        for key, value in two.items():
            torch.testing.assert_close(one[key], value, rtol=1e-4, atol=1e-6, msg=f"{arms[i]} {key}")
    assert mine[1].trainable_parameters == (
        66 if control == "random_direction" else mine[0].trainable_parameters
    )


@pytest.mark.parametrize("in_cohorts", [True, False])
def test_a_random_direction_takes_the_norms_of_the_run_of_its_anchor_that_was_done(
    folder, tmp_path, cohorts, in_cohorts
):
    """The same control comes out, and its anchor is not trained a second time."""
    from safetensors.torch import load_file

    from veneer.comparing import parse_arm

    options = {"base_dropout": False, "device": "cpu", "batch_size": 8}
    runner = default_runner(
        folder, opened(32, 16, 16), task=None, budget=parse_budget("demo"), options=options
    )
    trained = []
    own = runner.train
    runner.train = lambda arm, *given, **more: trained.append(str(arm)) or own(arm, *given, **more)
    anchor, control = parse_arm("lora:rank=2"), parse_arm("random_direction:rank=2")

    def done(arm, place, rate=2e-2):
        runs = [
            {"arm": arm, "seed": seed, "learning_rate": rate, "splits": ("validation", "test"),
             "output": tmp_path / place / "runs" / arm.slug / f"seed-{seed}"} for seed in (1, 2)
        ]  # fmt: skip
        results = together_room.train_runs(runner, runs) if in_cohorts else [runner(**run) for run in runs]
        return [load_file(f"{result.folder}/adapter.safetensors") for result in results]

    apart = done(control, "apart")
    trained.clear(), cohorts.clear()
    runner.anchors = anchors_of([anchor, control])
    done(anchor, "beside")
    beside = done(control, "beside")
    if in_cohorts:
        assert len(cohorts) == 2  # a third would be the anchors' once more
    else:
        assert trained == ["lora:rank=2"] * 4
    for one, two in zip(apart, beside):
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6, msg=key)
    assert any(float(value.norm()) > 1e-3 for key, value in beside[0].items() if key.endswith("/B"))
    # Of another rate they are not.
    output = tmp_path / "beside" / "runs" / control.slug / "seed-1"
    assert kept_norms(control, output, 1, 2e-2) is not None
    assert kept_norms(control, output, 1, 1e-2) is None
    assert kept_norms(control, output, 2, 2e-2) is None


def test_a_random_direction_whose_anchor_cannot_be_trained_is_an_error_and_no_lora(folder, tmp_path, cohorts):
    from veneer.comparing import parse_arm

    runner = default_runner(
        folder, opened(32, 16, 16), task=None, budget=parse_budget("demo"), options={"base_dropout": False}
    )
    runs = [
        {"arm": parse_arm("random_direction:rank=2"), "seed": 0, "learning_rate": rate, "splits": ("validation",),
         "output": tmp_path / str(i)} for i, rate in enumerate([1e30, 1e-3])
    ]  # fmt: skip
    bad, good = together_room.train_runs(runner, runs)
    assert "not finite" in str(bad)
    assert good.trainable_parameters == 66
    assert not together_room.is_able(runner, parse_arm("random_direction:init=pissa,rank=2"))


def test_the_base_is_opened_once_to_look_at_all_arms(folder, monkeypatch):
    from veneer.comparing import parse_arm

    runner = default_runner(
        folder, opened(32, 16, 16), task=None, budget=parse_budget("demo"), options={"base_dropout": False}
    )
    opening, times = runner.open_base, []
    monkeypatch.setattr(runner, "open_base", lambda: times.append(1) or opening())
    arms = [
        parse_arm(text) for text in ("untrained", "lora:rank=2", "ia3", "full", "random_direction:rank=2")
    ]
    together_room.look_at(runner, arms)
    assert [together_room.is_able(runner, arm) for arm in arms] == [False, True, True, False, True]
    assert len(times) == 1
    assert runner._base is None
