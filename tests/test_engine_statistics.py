"""Squared gradients: rows taken together give what the definition gives, and are not taken so where they would not."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import veneer
from training_tiny import bert, llama, opened, saved_bert
from veneer import engine
from veneer.engine import _statistics
from veneer.training import train_cohort


@pytest.fixture(autouse=True)
def drawn():
    torch.manual_seed(7)


def batch_of(rows=9, length=7, words=20):
    """Uneven rows, padded on the right."""
    lengths = torch.randint(2, length + 1, (rows,))
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(1, words, (rows, length)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 2, (rows,))}


def all_sites(model):
    veneer.attach(model, "fish_mask", name="plan")  # unprepared: only its sites are wanted
    host = engine.host_of(model)
    return host, [s.site for s in host.adapter("plan").plan.sites if s.part == 0]


def both(host, sites, batches, monkeypatch):
    """(what is found, by the definition), and how often rows were taken together."""
    counted = []
    together = _statistics.add_batch

    def count(*given):
        done = together(*given)
        counted.append(done)
        return done

    monkeypatch.setattr(_statistics, "add_batch", count)
    found = _statistics.squared_gradients(host, sites, batches)
    monkeypatch.setattr(_statistics, "layers_of", lambda *given: None)
    return found, _statistics.squared_gradients(host, sites, batches), counted


def test_rows_taken_together_give_the_definition_on_uneven_padded_rows(monkeypatch):
    model = bert(2, range(20)).double()
    host, sites = all_sites(model)
    found, exact, counted = both(host, sites, [batch_of(), batch_of(3)], monkeypatch)
    assert counted == [True, True, True]  # the look, 8 of 9 rows, 3 rows; a last row is taken by itself
    assert set(found) == set(exact)
    assert len(found) > 30
    top = max(float(v.max()) for v in exact.values())
    for name, value in exact.items():
        assert float((found[name] - value).abs().max()) <= 1e-10 * float(value.max()) + 1e-20 * top, name
    assert sum(float(v.sum()) > 0 for v in exact.values()) > 30  # the tensors are not compared as zeros


def test_the_sum_of_squares_is_not_the_square_of_the_sum(monkeypatch):
    """What a batched gradient alone would give is far from it, so that the comparison above can fail."""
    model = bert(2, range(20)).double()
    host, sites = all_sites(model)
    batch = batch_of(8)
    found = _statistics.squared_gradients(host, sites, [batch])
    name = next(n for n in found if n.endswith("intermediate.dense.weight"))
    engine.detach(model, "plan")
    parameter = dict(model.named_parameters())[name].requires_grad_(True)
    (summed,) = torch.autograd.grad(8 * model.eval()(**batch).loss, parameter)
    assert float((summed.square() - found[name]).norm() / found[name].norm()) > 0.1


def test_rows_with_a_label_for_every_token_are_taken_one_by_one(monkeypatch):
    model = llama(24)
    host, sites = all_sites(model)
    batch = batch_of()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    found, exact, counted = both(host, sites, [batch], monkeypatch)
    assert counted == []
    assert all(torch.equal(found[name], value) for name, value in exact.items())


class Small(nn.Module):
    """A model with a loss, and one trait that rows taken together would get wrong."""

    def __init__(self, trait=""):
        super().__init__()
        self.words, self.first = nn.Embedding(20, 6), nn.Linear(6, 6)
        self.inplace, self.last = nn.ReLU(inplace=True), nn.Linear(6, 2)
        self.trait = trait

    def forward(self, input_ids, labels, attention_mask=None):
        h = self.words(input_ids)
        if self.trait == "twice":
            h = self.first(h)
        if self.trait == "past the layer":
            h = h + nn.functional.linear(h, self.first.weight)
        h = self.first(h)
        if self.trait == "in place":
            h = self.inplace(h)
        logits = self.last(h.mean(1))
        if self.trait == "mixes rows":
            logits = logits - logits.mean(0)
        how = "sum" if self.trait == "sum" else "mean"
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels, reduction=how), logits=logits)


@pytest.mark.parametrize("trait", ["", "sum", "twice", "past the layer", "in place", "mixes rows"])
def test_what_would_come_out_wrong_is_taken_row_by_row(trait, monkeypatch):
    model = Small(trait).double()
    parameters = [p for n, p in model.named_parameters()]
    batch = batch_of(8)
    found = {id(p): torch.zeros_like(p) for p in parameters}
    exact = {id(p): torch.zeros_like(p) for p in parameters}
    together = []
    add = _statistics.add_batch
    monkeypatch.setattr(_statistics, "add_batch", lambda *a: together.append(len(a[2]["labels"])) or add(*a))
    assert _statistics._add_all(model, parameters, [batch], found) == 8
    for row in _statistics._parts(batch, 1):
        _statistics._add_row(model, parameters, row, exact)
    assert together == ([2, 8] if not trait else [2])
    for p in parameters:
        assert torch.allclose(found[id(p)], exact[id(p)], rtol=1e-10, atol=0)


def test_a_label_that_is_left_out_has_its_row_alone():
    from veneer.engine._row_squares import is_by_rows

    batch = batch_of(4)
    assert is_by_rows(batch)
    batch["labels"][2] = -100  # the mean is over three rows then
    assert not is_by_rows(batch)
    assert not is_by_rows({"input_ids": batch["input_ids"]})


def test_members_of_a_cohort_that_begin_alike_are_made_from_one_pass(tmp_path, monkeypatch):
    base = saved_bert(tmp_path / "bert")
    passes = []
    real = _statistics._pass
    monkeypatch.setattr(_statistics, "_pass", lambda *given: passes.append(1) or real(*given))
    same = {"method": "fish_mask:keep_ratio=0.05", "epochs": 1, "batch_size": 8}
    members = {
        "low": {**same, "learning_rate": 1e-3, "seed": 1, "output": tmp_path / "low"},
        "lora": {"method": "lora", "epochs": 1, "batch_size": 8, "output": tmp_path / "lora"},
        "high": {**same, "learning_rate": 1e-2, "seed": 1, "output": tmp_path / "high"},
        "other": {**same, "learning_rate": 1e-3, "seed": 2, "output": tmp_path / "other"},
    }
    found = train_cohort(members, model=base, data=opened(24, 8, 8), base_dropout=False, progress=False)
    assert not found.failed
    assert len(passes) == 2  # another seed has another head, and so another gradient

    from safetensors.torch import load_file

    from veneer.training import train

    alone = train(
        model=base, data=opened(24, 8, 8), base_dropout=False, progress=False,
        **{**members["high"], "output": tmp_path / "alone"},
    )  # fmt: skip
    assert len(passes) == 3
    assert alone.folder
    own, shared = (load_file(tmp_path / n / "adapter.safetensors") for n in ("alone", "high"))
    places = [k for k in own if "index" in k and own[k].numel()]
    assert places
    assert all(torch.equal(own[k], shared[k]) for k in places)
    for key, value in own.items():
        assert torch.allclose(value, shared[key], rtol=1e-4, atol=1e-6), key
