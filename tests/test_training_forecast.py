"""The forecast of a step's memory by a look: what autograd keeps of a method, seen on few tokens, right for many."""

import pytest
import torch

import veneer
from engine_tools import base
from veneer.training import forecast
from veneer.training.forecast import kept_by_method, step_memory


def truly_kept(model, rows, length):
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found = {}

    def keep(t):
        if t.untyped_storage()._cdata not in own:
            found[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    model.train()
    ids = torch.randint(5, 60, (rows, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return sum(s.nbytes() for s in found.values())


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "serial_adapter", "prefix_tuning"])
def test_what_is_kept_is_foreseen_from_few_tokens(method, family):
    model = base(family)
    options = {"length": 4} if method == "prefix_tuning" else {}
    said = kept_by_method(model, method, options, 5, 90 if family == "llama" else 40)
    veneer.attach(model, method, name="mine", **options)
    seen = truly_kept(model, 5, 90 if family == "llama" else 40)
    assert said.bytes == pytest.approx(seen, rel=0.05)
    assert 0 < said.largest < said.bytes


def test_a_look_leaves_the_model_and_the_random_numbers_as_they_were():
    model = base("llama")
    veneer.attach(model, "lora", name="mine")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    step_memory(model, "dora", rows=2, length=16)
    assert torch.equal(torch.rand(3), expected)
    assert list(veneer.adapters(model)) == ["mine"]
    assert veneer.engine.host_of(model).active == ("mine",)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert not model.training


def test_a_base_without_token_ids_is_forecast_by_the_formula():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    assert kept_by_method(model, "lora", {"sites": "linear"}, 2, 8) is None
    assert step_memory(model, "lora", {"sites": "linear"}, rows=2, length=8)["total"] > 0


def test_methods_that_keep_more_are_forecast_to_take_more():
    model = base("bert")
    assert (
        step_memory(model, "ssf", rows=8, length=32)["total"]
        > step_memory(model, "loreft", rows=8, length=32)["total"]
    )
    assert forecast.SHORT < forecast.LONG
