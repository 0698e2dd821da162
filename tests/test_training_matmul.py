"""Training over a form of the frozen matmul: it is measured, told, remembered, resumed, and shared by a cohort."""

import json

import pytest
import torch

import veneer
from training_tiny import bert_base, opened, saved_bert
from veneer.bases.matmul import matmul_of
from veneer.errors import BadOption, TrainingFailed
from veneer.training import Hooks, Predictor, train, train_cohort

torch.set_num_threads(1)
QUIET = {"progress": False, "device": "cpu", "learning_rate": 1e-2, "batch_size": 8}


class Stop(Hooks):
    def between_steps(self, run, step):
        if step == 3:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_bert(tmp_path_factory.mktemp("bert"))


def test_a_run_learns_over_each_form_and_its_error_is_among_the_notes():
    scores = {}
    for form in (None, "bf16", "int8"):
        result = train(model=bert_base(), data=opened(200, 100, 100), method="lora:rank=4", epochs=6, matmul=form,
                       **{**QUIET, "learning_rate": 2e-2, "batch_size": 16})  # fmt: skip
        scores[form] = result.metrics["validation"]["accuracy"]
        told = [note for note in result.notes if "matmul=" in note]
        assert len(told) == (0 if form is None else 2)
        if form is not None:
            assert "linear layers" in told[0]
            assert "the gradient of what trains by" in told[1]
    assert min(scores.values()) > 0.9


def test_a_folder_remembers_the_form_and_predicts_with_it(base, tmp_path):
    result = train(model=base, data=opened(), output=tmp_path, epochs=1, matmul="int8", **QUIET)
    assert json.loads((tmp_path / "veneer.json").read_text())["opens"]["matmul"] == "int8"
    rows = [{"text": "the film was good"}, {"text": "a dull plot"}]
    same, plain = Predictor.open(tmp_path), Predictor.open(tmp_path, matmul="plain")
    assert matmul_of(same.model).form == "int8"
    assert matmul_of(plain.model).form == "plain"
    ours, exact = same.predict(rows), plain.predict(rows)
    assert ours[0]["probabilities"] != exact[0]["probabilities"]
    assert ours[0]["probabilities"] == pytest.approx(exact[0]["probabilities"], abs=0.05)
    assert result.steps == 8


def test_a_stopped_run_goes_on_to_the_same_bits_and_not_in_another_form(base, tmp_path):
    given = {"model": base, "data": opened(), "epochs": 1, "save_every": 1, "matmul": "bf16", **QUIET}
    whole = train(output=tmp_path / "whole", **given)
    with pytest.raises(KeyboardInterrupt):
        train(output=tmp_path / "cut", hooks=[Stop()], **given)
    with pytest.raises(TrainingFailed, match="matmul"):
        train(output=tmp_path / "cut", **{**given, "matmul": "plain"})
    rest = train(output=tmp_path / "cut", **given)
    assert rest.predictions == whole.predictions
    files = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


def test_plain_is_the_run_that_names_no_form(base, tmp_path):
    train(model=base, data=opened(), output=tmp_path, epochs=1, **QUIET)
    again = train(model=base, data=opened(), output=tmp_path, epochs=1, matmul="plain", **QUIET)
    assert again.steps == 8


def test_members_of_a_cohort_share_the_form(base, tmp_path):
    members = {"a": {"method": "lora:rank=2"}, "b": {"method": "ia3"}}
    options = {"data": opened(), "epochs": 1, "batch_size": 8, "learning_rate": 1e-2}
    found = train_cohort(members, model=base, matmul="bf16", output=tmp_path, progress=False, **options)
    assert not found.failed
    for name, own in members.items():
        assert sum("matmul=bf16" in note for note in found.results[name].notes) == 2
        alone = train(model=base, matmul="bf16", progress=False, base_dropout=False, **options, **own)
        losses = [[h["loss"] for h in r.history if "loss" in h] for r in (found.results[name], alone)]
        assert losses[0] == pytest.approx(
            losses[1], rel=1e-2
        )  # bfloat16 rounds what another order of sums left


def test_a_model_in_memory_takes_the_form_and_keeps_it_where_none_is_given():
    base = bert_base()
    train(model=base, data=opened(), max_steps=1, matmul="packed", **QUIET)
    assert matmul_of(base.model).form == "packed"
    train(model=base, data=opened(), max_steps=1, **QUIET)
    assert matmul_of(base.model).form == "packed"
    train(model=base, data=opened(), max_steps=1, matmul="plain", **QUIET)
    assert matmul_of(base.model).form == "plain"
    assert not any(note.startswith("matmul=") for note in base.notes)
    with pytest.raises(BadOption, match="bf61"):
        train(model=base, data=opened(), matmul="bf61", **QUIET)


def test_the_forecast_counts_the_copies(base):
    opened_base = veneer.open_base(base, task="classify", num_labels=2, matmul="packed")
    plan = veneer.plan(opened_base.model, "lora")
    copies = matmul_of(opened_base.model).copies_in_training
    linear = sum(m.weight.numel() for m in opened_base.model.modules() if isinstance(m, torch.nn.Linear))
    assert copies == 2 * 4 * linear
    assert plan.memory(copies=copies)["total"] == plan.memory()["total"] + copies
