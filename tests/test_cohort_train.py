"""Cohorts to the end: each member ends as if it had been trained alone, whoever joins, leaves, fails or is killed."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import veneer
from training_tiny import bert_base, opened, saved_bert, sentences
from veneer.errors import BadFile, BadOption, TrainingFailed, UnknownOption
from veneer.training import Progress, read_cohort, train_cohort

MEMBERS = {
    "dropped": {"method": "lora:rank=4,dropout=0.2", "learning_rate": 3e-3, "seed": 1},
    "other-data": {
        "method": "ia3",
        "data": None,
        "batch_size": 8,
        "seed": 2,
        "epochs": 1,
        "weight_decay": 0.0,
    },
    "recipe": {
        "method": "lora:rank=2,dropout=0.1+lora_plus",
        "seed": 3,
        "schedule": "cosine",
        "accumulate": 2,
    },
    "schedule": {"method": "adalora", "seed": 1, "warmup": 2},
    "prompts": {"method": "prompt_tuning:length=3", "seed": 5},  # makes the batch longer for all
    "stops": {"method": "serial_adapter", "seed": 4, "early_stopping": 1, "evaluate_every": 2},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_bert(tmp_path_factory.mktemp("bert"))


def given(members=MEMBERS):
    own = opened(24, 8, 8)
    return {n: {**m, "data": own} if "data" in m else m for n, m in members.items()}


def tensors(folder):
    return load_file(folder / "adapter.safetensors")


def far(first, second):
    """The largest difference of two adapters' tensors, over the largest entry."""
    a, b = tensors(first), tensors(second)
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max() / (a[k].abs().max() + 1e-9)) for k in a if a[k].numel())


def test_members_end_where_training_alone_ends(base, tmp_path):
    data, members = opened(32, 16, 8), given()
    found = train_cohort(members, model=base, data=data, output=tmp_path / "both", progress=False, epochs=2)
    assert not found.failed
    for name, own in members.items():
        own = {"data": data, "epochs": 2, **own}
        alone = veneer.train(
            model=base, output=tmp_path / "one" / name, progress=False, base_dropout=False, **own
        )
        assert far(tmp_path / "one" / name, tmp_path / "both" / name) < 1e-5, name
        assert alone.steps == found[name].steps
        for split, metrics in alone.metrics.items():
            assert found[name].metrics[split] == pytest.approx(metrics, rel=1e-5)
    assert found["stops"].steps <= 4
    again = train_cohort(members, model=base, data=data, output=tmp_path / "both", progress=False, epochs=2)
    assert again["dropped"].to_dict() == {
        **found["dropped"].to_dict(),
        "folder": str(tmp_path / "both" / "dropped"),
    }


class Stop(Progress):
    """Interrupts at a step of any member, as Ctrl-C would."""

    def __init__(self, at):
        self.at = at

    def step(self, step, *rest):
        if step == self.at:
            raise KeyboardInterrupt


def test_a_cohort_that_was_stopped_goes_on_and_so_does_a_member_by_itself(base, tmp_path):
    data = opened(32, 8, 8)
    members = {"a": {"method": "lora:dropout=0.3", "seed": 1}, "b": {"method": "ia3", "seed": 2}}
    options = {"data": data, "epochs": 2, "batch_size": 8, "save_every": 1}
    for output in ("whole", "stopped", "alone"):
        progress = False if output == "whole" else Stop(4)
        try:
            train_cohort(members, model=base, output=tmp_path / output, progress=progress, **options)
        except KeyboardInterrupt:
            assert list((tmp_path / output / "a" / "checkpoints").glob("step-*"))
    train_cohort(members, model=base, output=tmp_path / "stopped", progress=False, **options)
    for name, own in members.items():
        veneer.train(
            model=base, output=tmp_path / "alone" / name, progress=False, base_dropout=False, **options, **own
        )
        assert far(tmp_path / "whole" / name, tmp_path / "stopped" / name) < 1e-6
        assert far(tmp_path / "whole" / name, tmp_path / "alone" / name) < 1e-5
    with pytest.raises(TrainingFailed, match="base_dropout"):
        veneer.train(model=base, output=tmp_path / "alone" / "a", progress=False, **options, **members["a"])


def test_a_member_that_diverges_or_cannot_begin_stops_alone(base, tmp_path):
    data, said = opened(32, 8, 8), []
    members = {
        "good": {"method": "lora"},
        "diverges": {"method": "lora", "learning_rate": 1e30},
        "whole": {"method": "lora", "whole": ["no.such.module"]},
        "none": {"method": "untrained"},
    }

    class Listener(Progress):
        def note(self, text):
            said.append(text)

    found = train_cohort(members, model=base, data=data, output=tmp_path, progress=Listener(), epochs=1)
    assert set(found.results) == {"good"}
    assert "not finite" in str(found.failed["diverges"])
    assert "no.such.module" in str(found.failed["whole"])
    assert "nothing to train" in str(found.failed["none"])
    assert any(line.startswith("diverges: stopped:") for line in said)
    alone = veneer.train(model=base, data=data, method="lora", epochs=1, base_dropout=False, progress=False)
    assert found["good"].metrics["validation"] == pytest.approx(alone.metrics["validation"], rel=1e-5)


@pytest.mark.parametrize("shared", [{"mixed_precision": "bf16"}, {"gradient_checkpointing": True}])
def test_bf16_and_checkpointing_are_for_all_and_change_little(base, shared):
    data = opened(32, 16, 8)
    members = {
        "a": {"method": "lora:dropout=0.2", "learning_rate": 1e-3},
        "b": {"method": "dora", "accumulate": 2},
    }
    found = train_cohort(members, model=base, data=data, progress=False, epochs=1, **shared)
    assert not found.failed
    close = 0.02 if "mixed_precision" in shared else 1e-5
    for name, own in members.items():
        options = {**own, **shared, "epochs": 1, "base_dropout": False}
        alone = veneer.train(model=base, data=data, progress=False, **options)
        mine = [h["loss"] for h in found[name].history if "loss" in h]
        assert mine == pytest.approx([h["loss"] for h in alone.history if "loss" in h], rel=close)
    with pytest.raises(BadOption, match="is one for a cohort"):
        train_cohort({"a": shared}, model=base, data=data)


def test_fit_lets_members_join_and_leave_and_keeps_what_they_learned():
    base = bert_base(fresh=False)
    cohort = veneer.Cohort(
        base.model, {"a": "lora:rank=2", "b": {"method": "ia3", "epochs": 9}}, learning_rate=1e-2
    )
    rounds = []

    def look(cohort):
        rounds.append(set(cohort.members))
        if len(rounds) == 1:
            cohort.add("late", "lora:rank=2", seed=5, batch_size=8)
        if len(rounds) == 3:
            cohort.remove("b")

    data = opened(32, 8, 8)
    found = cohort.fit(data, tokenizer=base.tokenizer, progress=False, epochs=2, on_round=look)
    assert set(found.results) == {"a", "late"}
    assert found["late"].steps == 8
    assert set(veneer.adapters(base.model)) == {"a", "late"}
    alone = bert_base(fresh=False)
    one = veneer.train(
        model=(alone.model, alone.tokenizer), data=data, method="lora:rank=2", learning_rate=1e-2, seed=5,
        batch_size=8, epochs=2, progress=False, base_dropout=False,
    )  # fmt: skip
    assert found["late"].metrics["validation"] == pytest.approx(one.metrics["validation"], rel=1e-5)
    ids = base.tokenizer(["good film", "bad film"], return_tensors="pt")
    with veneer.rows(base.model, ["a", "late"]):
        assert base.model(**ids).logits.shape == (2, 2)
    assert cohort.step({"a": {**ids, "labels": torch.tensor([1, 0])}})["a"] > 0


def test_the_file_says_what_is_wrong_with_it(tmp_path):
    path = tmp_path / "members.toml"
    for text, kind, said in (
        ("a = 1\nmodel == 2", BadFile, "line 2"),
        ('model = "m"', BadOption, "names no member"),
        ('[a]\nmodel = "m"', BadOption, "one for all"),
    ):
        path.write_text(text)
        with pytest.raises(kind, match=said):
            read_cohort(path)
    path.write_text('model = "m"\ncolumns = "text=t"\n[a]\nmethod = "ia3"\n')
    shared, members = read_cohort(path)
    assert shared == {"model": "m", "data_options": {"columns": "text=t"}}
    assert members == {"a": {"method": "ia3"}}
    with pytest.raises(UnknownOption, match="member 'a' has no option 'rank'"):
        train_cohort({"a": {"rank": 8, "data": opened(8, 4, 4)}}, model="m")
    with pytest.raises(BadOption, match="has no data"):
        train_cohort(members, model="m")
    with pytest.raises(BadOption, match="without a slash"):
        train_cohort({"a/b": {"data": opened(8, 4, 4)}}, model="m", output=tmp_path)


def write_rows(path, count, seed):
    lines = [f'"{r["text"]}",{("bad", "good")[r["label"]]}' for r in sentences(count, seed)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")


def command(file, output):
    return [
        sys.executable,
        "-m",
        "veneer",
        "train",
        "--cohort",
        str(file),
        "--output",
        str(output),
        "--device",
        "cpu",
    ]


@pytest.mark.slow
def test_the_command_trains_a_folder_each_and_goes_on_after_a_kill(base, tmp_path):
    write_rows(tmp_path / "rows.csv", 120, 1)
    file = tmp_path / "members.toml"
    file.write_text(
        f'model = "{base}"\ndata = "{tmp_path}/rows.csv"\nepochs = 6\nbatch_size = 4\nsave_every = 1\n'
        '[a]\nmethod = "lora:rank=4,dropout=0.1"\n[b]\nmethod = "ia3"\nseed = 3\n'
    )
    done = subprocess.run(command(file, tmp_path / "whole"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    running = subprocess.Popen(
        command(file, tmp_path / "killed"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 120
        while not list((tmp_path / "killed").glob("*/checkpoints/step-000000[1-9]*")):
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert not (tmp_path / "killed" / "a" / "result.json").exists()
    done = subprocess.run(
        [*command(file, tmp_path / "killed"), "--json"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stderr
    assert set(json.loads(done.stdout)["members"]) == {"a", "b"}
    for name in "ab":
        assert far(tmp_path / "whole" / name, tmp_path / "killed" / name) < 1e-6
    predicted = veneer.predict(tmp_path / "whole" / "a", ["a good film"])
    assert math.isfinite(max(predicted[0]["probabilities"].values()))
