"""Costs: each arm alone, in turns; what is counted is what the formula says, and an arm that dies is a line."""

import contextlib
import json
import os
import sys
import time

import numpy as np
import pytest
import torch

from test_comparing_fake import RATES, SIZES, FakeTrainer
from training_tiny import opened, saved_bert
from veneer.comparing import compare, parse_arm
from veneer.comparing.inference.analysis import Scores
from veneer.comparing.measures import _machine, cost_worker, costs
from veneer.comparing.measures import nursery as nurseries
from veneer.comparing.measures.fronts import fronts

WORKER = """
import json, sys
mode = open(sys.argv[1], "rb").read()
def say(**line): print(json.dumps(line), flush=True)
ready = dict(trainable_parameters=3, flops_per_step=5, peak_memory_bytes=7, runs_in_bytes=1000, model_bytes=9,
             longest_rows_tokens=4, available_bytes=100_000, machine={})
if b"dies" in mode: sys.exit("out of patience")
if b"hangs" in mode: sys.stdin.read(); import time; time.sleep(60)
say(**ready)
turn = 0
for line in sys.stdin:
    turn += 1
    if b"later" in mode and turn == 2: print("this is no JSON", flush=True); sys.exit(4)
    say(step_seconds=float(turn), cpu_seconds=1.0, energy_joules=None, tokens_per_second=2.0,
        latency_seconds=0.5, items_per_second=8.0)
    if turn == 5: break
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A worker that answers at once, in processes that begin with nothing."""
    (tmp_path / "answering.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(costs, "WORKER", "answering")
    monkeypatch.setattr(costs, "_nursery", contextlib.nullcontext)


MAIN = """
import os, sys, json, time
def main(path):
    mode = open(path).read()
    print("to be seen in the log", file=sys.stderr)
    if mode == "raises": raise ValueError("no more")
    if mode == "leaves": raise SystemExit(7)
    if mode == "hangs": time.sleep(60)
    for line in sys.stdin:
        print(json.dumps({"said": line.strip(), "wave": "wave" in sys.modules}), flush=True)
    return 3
"""


@pytest.fixture
def nursery(tmp_path):
    (tmp_path / "newborn.py").write_text(MAIN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # as costs does: only one thread may fork
    with nurseries.Nursery("newborn", environment, ["wave", "no_such_module"]) as made:
        yield made


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks on Linux alone")
def test_a_nursery_bears_children_that_answer_end_and_are_ended(nursery, tmp_path):
    def born(mode):
        path = tmp_path / f"{mode}.job"
        path.write_text(mode)
        return nursery.start(str(path), log)

    with open(tmp_path / "log", "w+") as log:
        first, second = born("answers"), born("answers")
        for child in (first, second):
            child.stdin.write("hello\n")
            child.stdin.flush()
            assert json.loads(child.stdout.readline()) == {"said": "hello", "wave": True}
        assert first.poll() is None
        first.stdin.close()
        assert first.wait(20) == 3  # its own end closed: the pipes of others are not held open
        assert second.poll() is None
        second.kill()
        assert second.wait(20) == -9
        assert born("leaves").wait(20) == 7
        assert born("raises").wait(20) == 1
        hanging = born("hangs")
        hanging.kill()
        assert hanging.wait(20) == -9
        log.seek(0)
        said = log.read()
    assert "to be seen in the log" in said
    assert "ValueError: no more" in said


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks on Linux alone")
def test_a_nursery_that_has_ended_bears_nothing_and_says_so(nursery, tmp_path):
    nursery._process.kill()
    nursery._process.wait()
    with open(tmp_path / "log", "w+") as log:
        assert nursery.start("nothing", log) is None
    assert nursery.exit_code(1) == 1


def jobs(*names):
    return {parse_arm(name): {"mode": name} for name in names}


def test_the_median_and_quartiles_of_alternating_turns_are_reported(worker):
    (line,) = costs.measure(jobs("fine"))
    assert line["status"] == "measured"
    assert (line["step_seconds_low"], line["step_seconds"], line["step_seconds_high"]) == (2.0, 3.0, 4.0)
    assert line["energy_joules"] is None
    assert line["peak_memory_bytes"] == 7
    assert line["turns"] == 5


def test_an_arm_that_dies_says_why_and_the_others_are_measured(worker):
    lines = {line["arm"]: line for line in costs.measure(jobs("dies", "fine", "later", "fine2"))}
    assert [line["status"] for line in lines.values()] == ["failed", "measured", "failed", "measured"]
    assert "out of patience" in lines["dies"]["reason"]
    assert "ended with code 4" in lines["later"]["reason"]


def test_an_arm_that_hangs_is_ended(worker, monkeypatch):
    monkeypatch.setattr(costs, "START_SECONDS", 0.3)
    (line,) = costs.measure(jobs("hangs"))
    assert line["status"] == "failed"
    assert "signal 9" in line["reason"]


def test_no_more_children_wait_than_fit_into_memory(worker, monkeypatch):
    seen = []
    turn = costs.Child.turn
    monkeypatch.setattr(costs.Child, "turn", lambda self: (seen.append(str(self.arm)), turn(self)))
    costs.measure(jobs("one", "two", "three"), turns=2)
    assert seen == ["one", "two", "three"] * 2  # there is room: all alternate
    seen.clear()
    monkeypatch.setattr(costs, "PARTS", 0.009)  # of 100 000 free bytes; a child takes 1000
    costs.measure(jobs("one", "two", "three"), turns=2)
    assert seen == ["one", "one", "two", "two", "three", "three"]


def test_an_interrupt_leaves_no_process_behind(worker, monkeypatch):
    children = []
    start = costs.Child.__init__
    monkeypatch.setattr(
        costs.Child, "__init__", lambda self, *given: (children.append(self), start(self, *given))[1]
    )

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(costs.Child, "turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        costs.measure(jobs("one", "two"))
    assert len(children) == 2
    assert all(child._process.poll() is not None for child in children)


# -- the child, in this process ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return saved_bert(folder)


def job(folder, arm, turns=2, **options):
    return {
        "model": str(folder), "data": opened(64, 8, 8), "method": arm, "is_trained": arm != "untrained",
        "learning_rate": 1e-3, "turns": turns, "options": {"batch_size": 8, "device": "cpu", "epochs": 3, **options},
    }  # fmt: skip


def worked(folder, arm, **options):
    said, waits = [], []
    cost_worker.work(job(folder, arm, **options), said.append, lambda: waits.append(len(said)))
    return said, waits


def test_the_child_trains_the_arm_and_waits_before_each_turn(base_folder):
    (ready, *turns), waits = worked(base_folder, "lora:rank=4")
    assert waits == [1, 2]  # once behind `ready`, once behind the first turn; the last ends it
    assert len(turns) == 2
    assert all(turn["step_seconds"] > 0 and turn["cpu_seconds"] > 0 for turn in turns)
    assert all(turn["latency_seconds"] > 0 and turn["items_per_second"] > 0 for turn in turns)
    assert ready["trainable_parameters"] == 2 * 2 * 2 * 4 * 32 + 32 * 2 + 2
    assert ready["runs_in_bytes"] >= ready["model_bytes"] > 0
    json.dumps([ready, turns])


def test_operations_are_those_of_the_products_and_full_costs_most(base_folder):
    flops = {
        arm: worked(base_folder, arm)[0][0]["flops_per_step"]
        for arm in ("linear_probe", "lora:rank=4", "full")
    }
    # A product is run forward, and backward once for its input and once for its weight; a probe has the
    # forward alone, and what leads to the frozen weights is not asked for in LoRA.
    assert 2.8 < flops["full"] / flops["linear_probe"] < 3.1
    assert 1.5 < flops["lora:rank=4"] / flops["linear_probe"] < 2.5


def test_the_untrained_base_predicts_in_turns_and_trains_nothing(base_folder):
    (ready, *turns), waits = worked(base_folder, "untrained")
    assert waits == [1, 2]
    assert ready["trainable_parameters"] == ready["peak_memory_bytes"] == 0
    assert all(turn["step_seconds"] == 0 and turn["latency_seconds"] > 0 for turn in turns)


def test_every_turn_trains_on_the_same_rows_and_the_warm_up_on_the_longest(base_folder):
    seen = []

    class Seeing(cost_worker.Turns):
        def between_steps(self, run, step):
            super().between_steps(run, step)
            if step < self.steps:
                seen.append(tuple(row["item"] for row in run.rows_of(step)))

    lengths = [len(row["text"].split()) for row in opened(64, 8, 8).train]
    cost_worker.Turns, kept = Seeing, cost_worker.Turns
    try:
        worked(base_folder, "lora", turns=3)
    finally:
        cost_worker.Turns = kept
    longest = max(range(64), key=lambda i: lengths[i])
    assert seen[0] == seen[1]
    assert max(lengths[i] for i in seen[0]) == lengths[longest]
    turns = seen[cost_worker.COUNTED :]
    assert turns[:2] == turns[2:4] == turns[4:6]
    assert turns[0] != turns[1]


def test_the_high_water_mark_sees_a_peak_that_is_over_and_can_be_set_back():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not let the mark be set back")
    assert _machine.reset_high_water()
    before = _machine.resident_bytes()
    block = torch.ones(16 * 2**20 // 4)
    del block
    high = _machine.high_water_bytes() - before
    assert 12 * 2**20 < high < 40 * 2**20
    _machine.reset_high_water()
    assert _machine.high_water_bytes() - before < 8 * 2**20


def test_energy_is_read_from_whole_packages_and_a_wrapped_counter_counts_on(tmp_path):
    assert _machine.joules({}, {}) is None
    for zone, now in (("intel-rapl:0", 900_000), ("intel-rapl:0:0", 5), ("intel-rapl:1", 100)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(str(now))
        (tmp_path / zone / "max_energy_range_uj").write_text("1000000")
    before = _machine.energy_counters(tmp_path)
    assert set(before) == {"intel-rapl:0", "intel-rapl:1"}
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("400000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("1000100")
    assert _machine.joules(before, _machine.energy_counters(tmp_path)) == pytest.approx(0.5 + 1.0)


def test_a_machine_that_was_busy_is_said():
    line = {"status": "measured", "step_seconds": 3.0, "cpu_seconds": 1.0, "machine": {"device": "cpu"}}
    assert costs.busy([line]) == 3.0
    assert costs.busy([line | {"cpu_seconds": 2.9}]) is None
    assert costs.busy([line | {"machine": {"device": "NVIDIA"}}]) is None
    assert costs.busy([line | {"cpu_seconds": 0.0}, {"status": "failed"}]) is None


# -- in a comparison ---------------------------------------------------------------------------------


class Apart(FakeTrainer):
    """A fake trainer that can be measured apart; `full` dies there."""

    def alone(self, arm, learning_rate):
        return {"mode": "dies" if arm.method == "full" else "fine"}


def run(folder, trainer, **options):
    given = {"rates": RATES, "budget": "demo", "sizes": SIZES, "progress": None} | options
    return compare("builtin:m", "builtin:d", ["lora:rank=1"], output=folder, run_arm=trainer, **given)


def test_what_was_measured_apart_replaces_what_workers_said(tmp_path, worker):
    summary = run(tmp_path, Apart()).to_dict()
    arms = summary["costs"]["arms"]
    assert summary["costs"]["measured"]
    assert arms["lora:rank=1"]["step_seconds"] == 3.0
    assert arms["lora:rank=1"]["turns_of"]["step_seconds"] == [1, 2, 3, 4, 5]
    assert arms["full"]["status"] == "failed"
    assert arms["full"]["step_seconds"] is None  # what the worker said is not compared with what was measured
    assert set(summary["fronts"]["step_seconds"]["probability"]) == {
        "untrained",
        "linear_probe",
        "lora:rank=1",
    }
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["step_seconds"] for row in rows if row["arm"] == "lora:rank=1"} == {3.0}
    assert {row["step_seconds"] for row in rows if row["arm"] == "full"} == {0.011}
    table = {arm["arm"]: arm for arm in summary["arms"]}
    assert table["lora:rank=1"]["peak_memory_bytes"] == 7
    assert arms["lora:rank=1"]["tuning_runs"] == 3
    assert arms["lora:rank=1"]["tuning_seconds"] >= 0


def test_a_control_is_not_measured_and_drives_nobody_off_a_front():
    from veneer.comparing.measures.sections import sections
    from veneer.comparing.publishing.records import Record

    scores = made_scores(**{"lora": 0.8, "full": 0.8, "random_direction": 0.9})
    records = [
        Record(
            parse_arm(arm),
            lines=[{"seed": seed, "step_seconds": 1.0} for seed in range(6)],
            opened=[None] * 6,
        )
        for arm in scores.of
    ]
    turn = {"step_seconds": 1.0, "latency_seconds": 1.0}
    lines = [{"arm": arm, "status": "measured", "step_seconds": 1.0, "cpu_seconds": 1.0, "each_turn": [turn],
              "peak_memory_bytes": 1, "tokens_per_second": 1.0, "machine": {}} for arm in ("lora", "full")]  # fmt: skip
    costs.put_into(records, lines)
    design = type("Design", (), {"beyond": {}})()
    found = sections(design, records, scores, scores, lambda records: scores)
    assert found["costs"]["arms"]["random_direction"]["status"] == "not_measured"
    assert "made from lora" in found["costs"]["arms"]["random_direction"]["reason"]
    assert all(set(front["probability"]) == {"lora", "full"} for front in found["fronts"].values())


def test_costs_are_kept_and_not_measured_again(tmp_path, worker, monkeypatch):
    first = run(tmp_path, Apart()).to_dict()["costs"]
    monkeypatch.setattr(costs, "measure", lambda *a, **k: pytest.fail("measured again"))
    assert run(tmp_path, Apart()).to_dict()["costs"] == first


def test_costs_can_be_left_out_and_a_trainer_in_memory_has_none(tmp_path, worker):
    assert not run(tmp_path / "a", Apart(), costs=False).to_dict()["costs"]["measured"]
    assert not run(tmp_path / "b", FakeTrainer()).to_dict()["costs"]["measured"]
    assert not (tmp_path / "b" / "costs.jsonl").exists()


def made_scores(**means):
    rng = np.random.default_rng(0)
    of = {arm: (rng.random((6, 400)) < mean).astype(float) for arm, mean in means.items()}
    return Scores(of, dict.fromkeys(of, tuple(range(6))), tuple(map(str, range(400))))


def test_an_arm_that_is_worse_and_dearer_is_on_no_front_and_the_cheapest_is_on_every():
    scores = made_scores(good=0.9, poor=0.6, cheap=0.6)
    price = {"good": 10, "poor": 20, "cheap": 1}
    found = fronts(scores, {arm: {"trainable_parameters": p} for arm, p in price.items()})
    assert set(found) == {"trainable_parameters"}
    probability = found["trainable_parameters"]["probability"]
    assert probability["good"] == probability["cheap"] == 1.0
    assert probability["poor"] == 0.0


def test_a_difference_in_time_that_the_turns_do_not_show_makes_no_front():
    """Two arms of equal quality by construction, timed 10 % apart with turns that scatter far more."""
    scores = made_scores(a=0.8)
    scores = Scores(
        {"a": scores.of["a"], "b": scores.of["a"]},
        {"a": scores.seeds["a"], "b": scores.seeds["a"]},
        scores.items,
    )
    rng = np.random.default_rng(1)
    noisy = {
        arm: {"step_seconds": float(np.median(t)), "turns_of": {"step_seconds": list(t)}}
        for arm, t in (("a", 1.0 + rng.random(5)), ("b", 1.1 + rng.random(5)))
    }
    probability = fronts(scores, noisy)["step_seconds"]["probability"]
    assert all(0.02 < p < 0.98 for p in probability.values())
    exact = {arm: {"step_seconds": found["step_seconds"]} for arm, found in noisy.items()}
    assert sorted(fronts(scores, exact)["step_seconds"]["probability"].values()) == [0.0, 1.0]


@pytest.mark.slow
def test_processes_measure_a_tiny_base_and_memory_rises_with_what_is_trained(base_folder):
    arms = ["untrained", "lora:rank=1", "full", "no_such_method"]
    began = time.monotonic()
    lines = {
        line["arm"]: line for line in costs.measure({parse_arm(arm): job(base_folder, arm) for arm in arms})
    }
    assert time.monotonic() - began < 300
    assert [line["status"] for line in lines.values()] == ["measured"] * 3 + ["failed"]
    assert "no method is called" in lines["no_such_method"]["reason"]
    assert lines["full"]["turns"] == 5
    assert lines["full"]["flops_per_step"] > lines["lora:rank=1"]["flops_per_step"]
