"""What settled edits made is kept while nothing changes, and its memory is given back."""

import copy

import pytest
import torch

import veneer
from engine_tools import add, base, inputs, out

DENSE = ("shira", "boft", "oft", "full")  # weight edits without a form beside the weight


def settled(method="shira", family="llama", **options):
    model = base(family)
    add(model, method, "a", **options)
    for leaf in model.veneer.adapter("a").leaves():
        leaf.requires_grad_(False)
    return model, inputs(family, 4)


@torch.no_grad()
def rebuilt(model, given, **more):
    """The same call with nothing kept."""
    model.veneer.dense.drop()
    return out(model, given, **more)


@pytest.mark.parametrize("method", DENSE)
def test_a_settled_dense_edit_gives_the_bits_of_one_that_is_made_anew(method):
    model, given = settled(method)
    with torch.no_grad():
        first, again = out(model, given), out(model, given)
        assert torch.equal(first, again)
        assert torch.equal(again, rebuilt(model, given))
        assert method == "full" or len(model.veneer.dense) > 0  # full's W' is its own tensor: nothing to keep


def test_kept_weights_are_made_once(monkeypatch):
    model, given = settled()
    made = []
    plain = type(model.veneer.adapter("a").method).delta
    monkeypatch.setattr(
        type(model.veneer.adapter("a").method), "delta", lambda *a: made.append(1) or plain(*a)
    )
    with torch.no_grad():
        out(model, given)
        assert made
        del made[:]
        out(model, given)
        out(model, given, adapters=["a", None, "a", None])  # its rows of a mixed batch use the very same
    assert not made


@pytest.mark.parametrize("what", ["adapter", "base", "data", "base_data", "grad"])
def test_a_change_in_place_is_seen(what):
    model, given = settled()
    adapter = model.veneer.adapter("a")
    site = adapter.plan.sites[0].site
    weight = model.get_parameter(f"{site.module}.{site.parameter}")
    with torch.no_grad():
        before = out(model, given)
        if what == "adapter":
            adapter.leaves()[0].mul_(2.0)
        elif what == "data":
            adapter.leaves()[0].data = adapter.leaves()[0].data * 2
        elif what == "base":
            weight.mul_(2.0)
        elif what == "base_data":
            weight.data = weight.data * 2
    if what == "grad":
        veneer.activate(model, "a")
        optimizer = torch.optim.Adam(adapter.leaves(), lr=0.1, fused=True)  # raises no versions
        out(model, given).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        after = out(model, given)
        assert not torch.equal(before, after)
        assert torch.equal(after, rebuilt(model, given))


def test_nothing_is_kept_while_training():
    model, given = settled()
    model.train()
    with torch.no_grad():
        out(model, given)
    assert len(model.veneer.dense) == 0
    model.eval()
    out(model, given)  # gradients are on
    assert len(model.veneer.dense) == 0
    with torch.no_grad():
        out(model, given)
    assert len(model.veneer.dense) > 0
    model.train()
    assert model.veneer.dense.bytes == 0


@pytest.mark.parametrize("how", ["detach", "train", "budget"])
def test_memory_of_what_was_kept_is_given_back(how):
    model, given = settled()
    add(model, "lora", "other")
    with torch.no_grad():
        out(model, given, adapters="a")
    values = [
        torch.multiprocessing.reductions.StorageWeakRef(e.value.untyped_storage())
        for e in model.veneer.dense._entries.values()
    ]
    assert values
    assert not any(v.expired() for v in values)
    if how == "detach":
        veneer.detach(model, "a")
    elif how == "train":
        model.train()
    else:
        model.veneer.dense.limit = 0
    assert all(v.expired() for v in values)
    assert model.veneer.dense.bytes == 0


def test_a_budget_below_one_pass_keeps_what_fits_and_gives_equal_results():
    model, given = settled()
    with torch.no_grad():
        expected = out(model, given)
        whole = model.veneer.dense.bytes
        model.veneer.dense.limit = whole // 2
        for _ in range(2):
            assert torch.equal(expected, out(model, given))
            assert 0 < model.veneer.dense.bytes <= whole // 2


def test_another_adapter_takes_the_place_of_one_used_longest_ago():
    model, given = settled()
    add(model, "shira", "b", seed=3)
    with torch.no_grad():
        out(model, given, adapters="a")
        model.veneer.dense.limit = model.veneer.dense.bytes
        expected = rebuilt(model, given, adapters="b")
        assert {k[0] for k in model.veneer.dense._entries} == {"b"}
        out(model, given, adapters="a")
        assert {k[0] for k in model.veneer.dense._entries} == {"a"}
        assert torch.equal(expected, out(model, given, adapters="b"))


def test_two_dense_edits_on_top_of_one_another_keep_their_changes():
    model, given = settled()
    add(model, "boft", "b", sites="attention.{query,value}", seed=3)
    with torch.no_grad():
        first = out(model, given, adapters=[("a", "b")] * 4)
        again = out(model, given, adapters=[("a", "b")] * 4)
        assert torch.equal(first, again)
        assert torch.equal(again, rebuilt(model, given, adapters=[("a", "b")] * 4))
        alone = out(model, given, adapters="a")
    assert not torch.allclose(first, alone)


def test_a_copy_and_the_model_keep_apart():
    model, given = settled()
    with torch.no_grad():
        expected = out(model, given)
        other = copy.deepcopy(model)
        assert len(other.veneer.dense) == 0
        other.veneer.adapter("a").leaves()[0].mul_(3.0)
        assert not torch.equal(out(other, given), expected)
        assert torch.equal(out(model, given), expected)
