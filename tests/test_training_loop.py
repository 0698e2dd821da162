"""The loop: it learns, it can be killed at any moment, and what goes wrong is said."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training_tiny import bert_base, opened
from veneer.errors import BadOption, TrainingFailed, UnknownName, UnknownOption
from veneer.training import Hooks, Phase, TrainResult, train
from veneer.training._batches import epoch_batches
from veneer.training._checkpoint import locked, pack, read_state, unpack, write_state

torch.set_num_threads(1)
QUIET = {"progress": False, "device": "cpu", "learning_rate": 1e-2}


def run(output=None, **options):
    given = {"method": "lora", "epochs": 2, "batch_size": 8, **QUIET, **options}
    return train(model=given.pop("model", None) or bert_base(), data=opened(), output=output, **given)


class Stop(Exception):
    pass


class StopAt(Hooks):
    """Stands in for a kill: leaves the loop behind a step, without a word."""

    def __init__(self, step):
        self.at = step

    def between_steps(self, run, step):
        if step == self.at:
            raise Stop


def test_a_tiny_encoder_learns_to_tell_two_classes_apart():
    result = train(
        model=bert_base(), data=opened(400, 100, 100), method="lora:rank=4", epochs=8,
        evaluate_on=("validation", "test"), **{**QUIET, "learning_rate": 2e-2},
    )  # fmt: skip
    assert result.metrics["test"]["accuracy"] > 0.95
    scores = [p["score"] for p in result.predictions["test"]]
    assert sum(scores) / len(scores) == result.metrics["test"]["accuracy"]
    assert [p["item"] for p in result.predictions["test"]] == list(range(100))
    # rank 4 at query and value of two blocks of width 32, and the fresh head
    assert result.trainable_parameters == 2 * 2 * 2 * 4 * 32 + 32 * 2 + 2


def test_a_result_is_plain_json_and_reads_back_equal(tmp_path):
    result = run(tmp_path / "one")
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    assert TrainResult.read(tmp_path / "one") == result
    size = sum((tmp_path / "one" / n).stat().st_size for n in ("veneer.json", "adapter.safetensors"))
    assert result.bytes_on_disk == size


def test_a_finished_run_returns_its_result_without_training_again(tmp_path):
    first = run(tmp_path / "one")

    class Never(Hooks):
        def between_steps(self, run, step):
            raise AssertionError("trained again")

    assert run(tmp_path / "one", hooks=[Never()]) == first


@pytest.mark.parametrize(
    "options",
    [
        {"save_every": 3},
        {"save_every": 1, "accumulate": 2, "schedule": "cosine"},
        {"save_every": 3, "early_stopping": 3, "evaluate_every": 2, "max_steps": 24},
        {"save_every": 2, "method": "adalora", "max_steps": 14},
    ],
    ids=["plain", "accumulated", "early-stopping", "adalora"],
)
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, options):
    whole = run(tmp_path / "whole", **options)
    for at in (4, 8):
        with pytest.raises(Stop):
            run(tmp_path / "cut", hooks=[StopAt(at)], **options)
    again = run(tmp_path / "cut", **options)
    one, two = (load_file(tmp_path / n / "adapter.safetensors") for n in ("whole", "cut"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert again.predictions == whole.predictions
    assert again.history == whole.history
    assert (again.steps, again.trained_tokens) == (whole.steps, whole.trained_tokens)


SCRIPT = """
import sys, time, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from test_training_loop import run
from veneer.training import Hooks
class Slow(Hooks):
    def between_steps(self, run, step):
        time.sleep(0.03)
run({output!r}, save_every=1, epochs=8, hooks=[Slow()])
print("finished")
"""


def test_a_killed_process_resumes_to_the_bits_of_one_that_was_not(tmp_path):
    script = SCRIPT.format(tests=str(Path(__file__).parent), output=str(tmp_path / "killed"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE)
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 60
    while len(list(checkpoints.glob("step-0000001[0-9]"))) == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.communicate()[0] == b"", "the run finished before it was killed"
    stopped_at = int(sorted(checkpoints.glob("step-*"))[-1].name.removeprefix("step-"))
    assert 10 <= stopped_at < 64
    resumed = run(tmp_path / "killed", save_every=1, epochs=8)
    whole = run(tmp_path / "whole", save_every=1, epochs=8)
    assert (tmp_path / "killed" / "adapter.safetensors").read_bytes() == (
        tmp_path / "whole" / "adapter.safetensors"
    ).read_bytes()
    assert resumed.predictions == whole.predictions


def test_other_settings_in_the_same_folder_are_refused_and_named(tmp_path):
    run(tmp_path / "one")
    with pytest.raises(TrainingFailed, match=r"learning_rate: 0\.01 there, 0\.02 now"):
        run(tmp_path / "one", learning_rate=0.02)
    with pytest.raises(TrainingFailed, match=r"identity\.method: 'lora' there, 'lora:rank=2' now"):
        run(tmp_path / "one", method="lora:rank=2")


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with locked(tmp_path / "one"), pytest.raises(TrainingFailed, match=f"process {os.getpid()}"):
        run(tmp_path / "one")


def test_accumulation_is_the_large_batch_in_parts(tmp_path):
    losses = []
    for accumulate in (1, 4):
        base = bert_base()
        for module in base.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # draws of dropout differ between one batch and its parts
        result = run(accumulate=accumulate, model=base)
        losses.append([h["loss"] for h in result.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != losses[0][-1]


def test_the_callers_random_numbers_are_not_touched():
    base = bert_base()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(max_steps=2, model=base)
    assert torch.equal(torch.rand(3), expected)


def test_seeds_give_other_runs_and_equal_seeds_equal_ones():
    one, same, other = (run(max_steps=6, seed=s).history for s in (0, 0, 1))
    assert one == same
    assert one != other


def test_a_loss_that_is_not_finite_stops_with_the_module_and_the_rows(tmp_path):
    base = bert_base()
    with torch.no_grad():
        base.model.bert.encoder.layer[1].intermediate.dense.weight[0, 0] = float("inf")
    with pytest.raises(TrainingFailed) as caught:
        run(tmp_path / "one", model=base)
    assert "bert.encoder.layer.1.intermediate.dense" in str(caught.value)
    assert "step 0" in str(caught.value)
    assert "training rows" in str(caught.value)
    assert "learning_rate=0.001" in str(caught.value)


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tmp_path):
    class Break(Hooks):
        def on_gradients(self, run, step):
            if step == 5:
                run.subject.parameters()[0].grad.fill_(float("nan"))

    with pytest.raises(TrainingFailed, match="the gradient is not finite at step 5") as caught:
        run(tmp_path / "one", save_every=2, hooks=[Break()])
    kept = tmp_path / "one" / "checkpoints" / "step-00000004"
    assert str(kept) in str(caught.value)
    state = read_state(kept, "adapter")["adapter"]
    assert all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point())
    assert run(tmp_path / "one", save_every=2).steps == 16


def test_nothing_to_train_is_said_before_the_first_step():
    class Empty:
        model = torch.nn.Linear(2, 2)

        def groups(self, *_):
            return [{"params": []}]

    from veneer.tasks import Encoded, make_task
    from veneer.training import Run, Settings

    rows = Encoded([{"item": 0, "length": 1}])
    with pytest.raises(TrainingFailed, match="nothing to train"):
        Run(
            Empty(),
            make_task("classify"),
            {"train": rows},
            None,
            Settings(),
            learning_rate=1.0,
            accelerator=None,
        )


def test_unknown_options_and_schedules_name_the_nearest():
    with pytest.raises(UnknownOption, match="learning_rate"):
        run(learning_rat=1.0)
    with pytest.raises(UnknownName, match="cosine"):
        run(schedule="cosin")
    with pytest.raises(BadOption, match="batch_size=0"):
        run(batch_size=0)


def test_early_stopping_keeps_the_adapter_of_the_best_look(tmp_path):
    result = run(tmp_path / "one", epochs=10, early_stopping=2, evaluate_every=4, learning_rate=3e-2)
    looks = [h for h in result.history if h.get("split") == "validation"]
    best = max(look["accuracy"] for look in looks)
    assert result.metrics["validation"]["accuracy"] == best
    assert not (tmp_path / "one" / "checkpoints").exists()


def test_hooks_are_called_where_they_say():
    seen = []

    class Watch(Hooks):
        def phases(self, run):
            def phase(name, share):
                return Phase(
                    name, share, enter=lambda r: seen.append(f"enter {name} at {r.step_now}"),
                    exit=lambda r: seen.append(f"exit {name} at {r.step_now}"), optimizer="rebuild",
                )  # fmt: skip

            return [phase("one", 1), phase("two", 3)]

        def loss_terms(self, run, batch):
            return {"nothing": torch.zeros(())}

        def on_gradients(self, run, step):
            assert all(p.grad is not None for p in run.subject.parameters())
            seen.append(f"gradients {step}")

        def exchange(self, run, message):
            return {k: g * 0 for k, g in message.items()}

    base = bert_base()
    result = run(model=base, max_steps=4, weight_decay=0.0, hooks=[Watch()])
    assert seen == [
        "enter one at 0",
        "gradients 0",
        "exit one at 1",
        "enter two at 1",
        "gradients 1",
        "gradients 2",
        "gradients 3",
        "exit two at 4",
    ]
    assert result.steps == 4


def test_zeroed_gradients_from_an_exchange_leave_the_adapter_where_it_was():
    class Silence(Hooks):
        def __init__(self):
            self.start = None

        def between_steps(self, run, step):
            if step == 0:
                self.start = [p.detach().clone() for p in run.subject.parameters()]
            self.end = [p.detach().clone() for p in run.subject.parameters()]

        def exchange(self, run, message):
            return {k: g * 0 for k, g in message.items()}

    hooks = Silence()
    run(max_steps=3, weight_decay=0.0, hooks=[hooks])
    assert all(torch.equal(a, b) for a, b in zip(hooks.start, hooks.end))


def test_a_step_hook_replaces_the_step_and_its_closure_draws_the_same_twice():
    values = []

    class Twice(Hooks):
        def step(self, run, closure, step):
            with torch.no_grad():
                values.append((float(closure(backward=False)), float(closure(backward=False))))
            return torch.tensor(values[-1][0])

    run(max_steps=3, hooks=[Twice()])
    assert all(one == two for one, two in values)
    assert len({one for one, _ in values}) == 3


def test_every_row_is_in_an_epoch_once_and_lengths_are_near_in_a_batch():
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (1003,), generator=draw).tolist()
    batches = epoch_batches(lengths, 8, seed=3, epoch=1)
    assert sorted(i for b in batches for i in b) == list(range(1003))
    assert batches == epoch_batches(lengths, 8, seed=3, epoch=1)
    assert batches != epoch_batches(lengths, 8, seed=3, epoch=2)
    padded = sum(max(lengths[i] for i in b) * len(b) for b in batches)
    assert padded < 1.1 * sum(lengths)


def test_states_of_any_nesting_pack_into_json_and_tensors():
    state = {"a": [1, 2.5, (None, "x")], 3: {"t": torch.arange(3), "b": torch.ones(2, dtype=torch.bfloat16)}}
    packed, tensors = pack(state)
    back = unpack(json.loads(json.dumps(packed)), tensors)
    assert back["a"] == [1, 2.5, (None, "x")]
    assert torch.equal(back[3]["t"], torch.arange(3))
    assert back[3]["b"].dtype == torch.bfloat16


def test_a_truncated_checkpoint_is_named_not_half_read(tmp_path):
    write_state(tmp_path / "step-1", {"adapter": {"t": torch.randn(100)}})
    file = tmp_path / "step-1" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    from veneer.errors import BadFile

    with pytest.raises(BadFile, match="step-1"):
        read_state(tmp_path / "step-1", "adapter")


def test_untrained_is_the_base_as_it_is():
    result = run(method="untrained")
    assert (result.steps, result.trainable_parameters) == (0, 0)
    assert 0 <= result.metrics["validation"]["accuracy"] <= 1


def test_a_start_that_needs_data_is_made_from_training_rows():
    result = run(method="fish_mask", max_steps=2)
    assert any("64 training rows" in note for note in result.notes)
    assert result.steps == 2


def test_too_little_memory_names_the_settings_that_help():
    class Full(Hooks):
        def on_gradients(self, run, step):
            raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    with pytest.raises(TrainingFailed) as caught:
        run(hooks=[Full()], accumulate=2)
    said = str(caught.value)
    assert "3 GiB" in said
    for way in ("accumulate=4", "gradient_checkpointing=True", "max_length="):
        assert way in said


def test_lines_of_progress_go_to_standard_error_and_quiet_is_quiet(capsys):
    run(progress=True, early_stopping=5)
    said = capsys.readouterr()
    assert said.out == ""
    assert "step 16/16  loss" in said.err
    assert "validation accuracy" in said.err
    assert "note: " in said.err
    run()
    assert capsys.readouterr().err == ""


def test_arms_are_read_as_people_type_them():
    from veneer.training._arm import parsed, text

    arm = parsed(
        "loreft:rank=4,positions=prompt[:4] + prompt[-4:],sites=attention.{query,value}+lora_plus:ratio=1e+1"
    )
    assert arm.method == (
        "loreft", {"rank": 4, "positions": "prompt[:4] + prompt[-4:]", "sites": "attention.{query,value}"}
    )  # fmt: skip
    assert arm.recipes == (("lora_plus", {"ratio": 10.0}),)
    assert text(arm.recipes[0]) == "lora_plus:ratio=10.0"
    with pytest.raises(BadOption, match="option=value"):
        parsed("lora:rank")
    with pytest.raises(BadOption, match="one recipe"):
        run(method="lora+mezo+lora_plus")


def test_members_are_combined_and_named_in_the_folder(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        run(tmp_path / name, method="serial_adapter", max_steps=2, seed=seed)
    members = {"a": tmp_path / "a", "b": tmp_path / "b"}
    result = run(tmp_path / "both", method="adapter_fusion", max_steps=2, members=members)
    assert result.steps == 2
    opens = json.loads((tmp_path / "both" / "veneer.json").read_text())["opens"]
    assert opens["members"] == {n: str(p) for n, p in members.items()}


def test_a_budget_of_tokens_is_real_tokens_and_the_same_for_every_method():
    one, two = (run(max_tokens=900, method=m) for m in ("lora", "ia3"))
    assert one.steps == two.steps
    assert one.trained_tokens == two.trained_tokens
    lengths = [len(r["text"].split()) + 2 for r in opened().train]  # [CLS] and [SEP]
    assert 900 <= one.trained_tokens < 900 + 8 * max(lengths)
    assert one.history[-1]["learning_rate"] < 2e-3  # the schedule ends where the budget does
    with pytest.raises(BadOption, match="give one"):
        run(max_tokens=900, max_steps=3)


def test_an_optimizer_that_lost_the_adapter_is_not_trained_on_in_silence():
    class Replace(Hooks):
        """Sorts the adapter's tensors into new leaves, and says nothing of it."""

        def __init__(self, said):
            self.said = said

        def between_steps(self, run, step):
            import veneer.engine as engine

            if step == 3:
                engine.relayout(run.model, "trained", lambda site, name, spec: (name, 1.0))
                return self.said
            return None

    with pytest.raises(TrainingFailed, match="groups_changed"):
        run(hooks=[Replace(None)])
    # The optimizer's memory goes along: the run is the one that was not sorted anew.
    exact = {"clip": None, "schedule": "constant"}
    moved, plain = run(hooks=[Replace("groups_changed")], **exact), run(**exact)
    assert [h["loss"] for h in moved.history] == pytest.approx([h["loss"] for h in plain.history], abs=1e-6)
    assert plain.history[0]["loss"] != plain.history[-1]["loss"]


def test_rows_with_arrays_have_a_digest_of_every_value():
    import numpy as np

    from veneer.training._open import Rows

    one, two = np.zeros((40, 40)), np.zeros((40, 40))
    two[20, 20] = 1
    digests = {Rows({"train": [{"image": a}]}, "image-classify", [], "").digest for a in (one, two)}
    assert len(digests) == 2


def test_a_split_that_is_not_there_is_named_and_an_empty_one_is_said():
    with pytest.raises(BadOption, match="validaton"):
        run(max_steps=1, evaluate_on="validaton")
    data = opened(16, 0, 0)
    result = train(model=bert_base(), data=data, method="lora", max_steps=1, **QUIET)
    assert result.metrics == {}
    assert "there are no validation rows, so that nothing is measured on them" in result.notes


def test_the_live_bar_takes_steps_and_notes(capsys):
    from veneer.training._progress import Live

    bar = Live()
    bar.begin(3)
    bar.step(1, 0.5, 1e-3, 100.0)
    bar.note("note: [brackets] stay")
    bar.evaluated(1, "validation", {"accuracy": 0.5})
    bar.end()
    said = capsys.readouterr()
    assert "[brackets] stay" in said.err
    assert said.out == ""


def test_a_full_disk_is_said_and_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    class Fill(Hooks):
        def between_steps(self, run, step):
            if step == 5:
                monkeypatch.setattr(os, "fsync", full)

    def full(handle):
        raise OSError(28, "No space left on device")

    with pytest.raises(TrainingFailed, match="No space left"):
        run(tmp_path / "one", save_every=2, hooks=[Fill()])
    monkeypatch.undo()
    folder = tmp_path / "one" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step-00000004"]
    whole = run(tmp_path / "whole", save_every=2)
    assert run(tmp_path / "one", save_every=2).predictions == whole.predictions


@pytest.mark.parametrize("method", ["lora", "full", "prefix_tuning"])
def test_a_base_in_bfloat16_trains_and_resumes(tmp_path, method):
    def options():
        base = bert_base()
        base.model.to(torch.bfloat16)
        return {"model": base, "method": method, "save_every": 1, "max_steps": 6}

    whole = run(tmp_path / "whole", **options())
    with pytest.raises(Stop):
        run(tmp_path / "cut", hooks=[StopAt(3)], **options())
    assert run(tmp_path / "cut", **options()).history == whole.history
    assert len({h["loss"] for h in whole.history}) > 3


def test_two_trainings_on_one_open_base_are_those_of_two_bases():
    import veneer.engine as engine

    base = bert_base()
    first, second = run(model=base, max_steps=6), run(model=base, max_steps=6, method="ia3")
    assert list(engine.adapters(base.model)) == ["trained", "trained-2"]
    assert first.history == run(max_steps=6).history
    assert second.history == run(max_steps=6, method="ia3").history


def test_a_training_that_fails_leaves_the_model_as_it_was():
    import veneer.engine as engine

    base = bert_base()
    before = {n: p.clone() for n, p in base.model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in base.model.named_parameters()}
    with pytest.raises(Stop):
        run(model=base, hooks=[StopAt(3)], gradient_checkpointing=True)
    assert engine.adapters(base.model) == {}
    assert base.model.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in base.model.state_dict().items())
    assert {n: p.requires_grad for n, p in base.model.named_parameters()} == flags
    assert not base.model.is_gradient_checkpointing
    assert run(model=base, max_steps=4).history == run(max_steps=4).history


def test_rows_in_memory_are_split_and_trained_on():
    from training_tiny import sentences

    rows = [{**row, "label": ("bad", "good")[row["label"]]} for row in sentences(80, 5)]
    result = train(model=bert_base(), data=rows, method="lora", max_steps=2, evaluate_on=("test",), **QUIET)
    assert {p["label"] for p in result.predictions["test"]} <= {"bad", "good"}
    assert result.steps == 2


def test_figures_that_are_not_finite_are_null_in_the_files(tmp_path):
    result = run(tmp_path / "one", max_steps=1)
    result.metrics["validation"]["accuracy"] = float("nan")
    result.predictions["validation"][0]["score"] = float("-inf")
    result.write(tmp_path / "one")
    again = TrainResult.read(tmp_path / "one")
    assert again.metrics["validation"]["accuracy"] is None
    assert again.predictions["validation"][0]["score"] is None
