"""What settled edits made is kept while nothing changes, and its memory is given back."""

import copy

import pytest
import torch

import veneer
from engine_tools import add, base, inputs, out
from veneer.errors import BadOption

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


# -- adapters beyond a budget ----------------------------------------------------------------------------------


def populated(count=4, method="lora", family="llama"):
    """A base with adapters that nobody trains, their outputs, and the bytes of one."""
    model = base(family)
    names = [f"a{i}" for i in range(count)]
    for i, name in enumerate(names):
        add(model, method, name, seed=i)
    veneer.activate(model, None)
    given = inputs(family, 4)
    with torch.no_grad():
        expected = {n: out(model, given, adapters=n) for n in names}
    one = sum(p.numel() * p.element_size() for p in model.veneer.adapter("a0").leaves())
    return model, names, given, expected, one


@pytest.mark.parametrize("method", ["lora", "vera", "prefix_tuning", "shira"])
def test_adapters_that_come_and_go_give_the_bits_of_those_that_stay(method):
    model, names, given, expected, one = populated(method=method)
    used = veneer.memory_budget(model, adapters=2 * one)
    assert len(used.away) >= 2
    assert used.adapters <= 2 * one
    with torch.no_grad():
        for name in [*names, *reversed(names), names[0], names[2]]:
            assert torch.equal(out(model, given, adapters=name), expected[name])
            assert name not in veneer.memory_budget(model).away
            assert veneer.memory_budget(model).adapters <= 2 * one
    back = veneer.memory_budget(model, adapters=None)
    assert not back.away
    assert back.adapters == used.adapters + used.disk
    assert not list(model.veneer.pages._files)


def test_the_one_used_longest_ago_leaves_first():
    model, _, given, _, one = populated()
    veneer.memory_budget(model, adapters=4 * one)
    with torch.no_grad():
        for name in ("a2", "a0", "a3", "a1"):
            out(model, given, adapters=name)
    assert veneer.memory_budget(model, adapters=2 * one).away == ("a0", "a2")


def test_rows_of_one_batch_may_need_more_than_the_budget():
    model, names, given, expected, one = populated()
    veneer.memory_budget(model, adapters=one)
    with torch.no_grad():
        veneer.memory_budget(model, adapters=None)
        mixed = out(model, given, adapters=names)
        veneer.memory_budget(model, adapters=one)
        assert torch.equal(out(model, given, adapters=names), mixed)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], expected[name][i])
    assert len(veneer.memory_budget(model, adapters=one).away) == 3


@pytest.mark.parametrize("how", ["active", "trained", "running"])
def test_an_adapter_in_use_stays(how):
    model, _, given, _, _ = populated(2)
    adapter = model.veneer.adapter("a0")
    if how == "active":
        veneer.activate(model, "a0")
    elif how == "trained":
        adapter.leaves()[0].requires_grad_(True)
    seen = []
    if how == "running":
        handle = model.lm_head.register_forward_hook(
            lambda *_: seen.append(veneer.memory_budget(model, adapters=0).away) and None
        )
        with torch.no_grad():
            out(model, given, adapters="a0")
        handle.remove()
        assert seen == [("a1",)]
        seen = [veneer.memory_budget(model).away]
        assert seen == [("a1",)]
        assert set(veneer.memory_budget(model, adapters=0).away) == {"a0", "a1"}
    else:
        assert veneer.memory_budget(model, adapters=0).away == ("a1",)


def test_memory_of_adapters_that_left_the_device_is_given_back():
    model, names, given, _, _ = populated(3)
    held = [
        torch.multiprocessing.reductions.StorageWeakRef(leaf.untyped_storage())
        for n in names for leaf in model.veneer.adapter(n).leaves()
    ]  # fmt: skip
    with torch.no_grad():
        out(model, given, adapters=["a0", "a1", "a2", None])
    veneer.memory_budget(model, adapters=0)
    assert all(h.expired() for h in held)


@pytest.mark.parametrize("away", [False, True])
def test_memory_of_a_removed_adapter_is_given_back(away, tmp_path):
    model, _, given, _, _ = populated(3)
    with torch.no_grad():
        out(model, given, adapters=["a0", "a1", "a2", None])
    if away:
        veneer.memory_budget(model, adapters=0, folder=tmp_path)
        assert len(list(tmp_path.iterdir())) == 3
    storages = [
        torch.multiprocessing.reductions.StorageWeakRef(leaf.untyped_storage())
        for leaf in model.veneer.adapter("a1").leaves()
    ]
    veneer.detach(model, "a1")
    assert all(s.expired() for s in storages)
    if away:
        assert len(list(tmp_path.iterdir())) == 2
    with torch.no_grad():
        out(model, given, adapters=["a0", "a2", None, None])


def test_what_is_written_to_an_adapter_that_is_away_is_there_when_it_comes_back(tmp_path):
    model, _, given, expected, _ = populated(2)
    veneer.memory_budget(model, adapters=0)
    leaf = model.veneer.adapter("a0").leaves()[0]
    kept = leaf.detach().clone()
    with torch.no_grad():
        leaf.mul_(2.0)
        moved = out(model, given, adapters="a0")
        assert not torch.equal(moved, expected["a0"])
        veneer.memory_budget(model, adapters=0)
        leaf.data.mul_(0.5)  # past torch's versions
        assert torch.equal(leaf, kept)
        veneer.memory_budget(model, adapters=None)
        veneer.memory_budget(model, adapters=0)
        assert torch.equal(out(model, given, adapters="a0"), expected["a0"])


def test_an_adapter_that_is_away_is_saved_merged_trained_and_copied_like_any_other(tmp_path):
    model, _, given, expected, _ = populated(2)
    veneer.memory_budget(model, adapters=0)
    assert len(veneer.memory_budget(model).away) == 2
    veneer.save(model, "a0", tmp_path / "a0")
    other = copy.deepcopy(model)
    veneer.memory_budget(model, adapters=None)
    with torch.no_grad():
        assert torch.equal(out(other, given, adapters="a1"), expected["a1"])
    fresh = base("llama")
    veneer.load(fresh, tmp_path / "a0")
    with torch.no_grad():
        assert torch.equal(out(fresh, given), expected["a0"])
    veneer.memory_budget(other, adapters=0)
    veneer.activate(other, "a0")
    out(other, given).sum().backward()
    assert other.veneer.adapter("a0").leaves()[0].grad.abs().sum() > 0
    veneer.memory_budget(model, adapters=0)
    veneer.merge(model, "a0")
    with torch.no_grad():
        torch.testing.assert_close(out(model, given), expected["a0"])


def test_cpu_memory_lies_between_the_device_and_files(monkeypatch, tmp_path):
    from veneer.engine._pages import Pages

    monkeypatch.setattr(Pages, "_has_cpu_below", lambda self: True)  # as on a GPU
    model, names, given, expected, one = populated()
    used = veneer.memory_budget(model, adapters=one, cpu=2 * one, folder=tmp_path)
    assert (used.adapters, used.cpu, used.disk) == (one, 2 * one, one)
    assert len(list(tmp_path.iterdir())) == 1
    with torch.no_grad():
        for name in names * 2:
            assert torch.equal(out(model, given, adapters=name), expected[name])
            used = veneer.memory_budget(model)
            assert (used.adapters, used.cpu, used.disk) == (one, 2 * one, one)


@pytest.mark.parametrize("bad", [-1, "much", "1 XB", True, 1.5])
def test_a_budget_that_is_no_number_of_bytes_is_refused(bad):
    model, *_ = populated(1)
    with pytest.raises(BadOption, match="bytes"):
        veneer.memory_budget(model, adapters=bad)


def test_a_budget_may_be_written_with_its_unit():
    model, *_ = populated(1)
    assert veneer.memory_budget(model, adapters="1.5 KiB").adapters_limit == 1536
    assert veneer.memory_budget(model, edits="2MB").edits_limit == 2_000_000


def test_slots_are_kept_by_those_that_stay_and_used_again():
    model, names, _, _, _ = populated(4)
    (slots,) = model.veneer.members.values()
    assert slots == {"a0": 1, "a1": 2, "a2": 3, "a3": 4}
    veneer.detach(model, "a1")
    veneer.detach(model, "a0")
    add(model, "lora", "new", seed=7)
    (slots,) = model.veneer.members.values()
    assert {n: slots[n] for n in names[2:]} == {"a2": 3, "a3": 4}
    assert slots["new"] in (1, 2)
    add(model, "lora", "newer", seed=8)
    assert sorted(model.veneer.members[id(model.veneer.adapter("a2").plan)].values()) == [1, 2, 3, 4]


def test_compiled_code_reads_the_right_adapter_where_slots_were_left_and_used_again():
    model, _, given, expected, _ = populated(4)
    veneer.detach(model, "a0")
    veneer.detach(model, "a2")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for name in ("a3", "a1", None):
            veneer.activate(model, name)
            y = out(compiled, given)
            torch.testing.assert_close(y, expected[name] if name else out(model, given, adapters=None))
        add(model, "lora", "new", seed=9)
        torch.testing.assert_close(out(compiled, given), out(model, given, adapters="new"))
