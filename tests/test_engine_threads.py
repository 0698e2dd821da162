"""Adapters come, go and are replaced while other threads run the model: a call sees one moment."""

import ast
import threading
import time

import pytest
import torch

import veneer
from engine_tools import add, base, inputs, out
from veneer.errors import UnknownAdapter

SECONDS = 1.0


def versions(model, given, rows, count=3, method="lora"):
    """Values of an adapter "x" by version, and the batch's output under each."""
    values, expected = [], []
    for i in range(count):
        adapter = add(model, method, "x", seed=10 + i)
        veneer.activate(model, None)
        values.append({k: v.clone() for k, v in adapter.named().items()})
        with torch.no_grad():
            expected.append(out(model, given, adapters=rows))
        veneer.detach(model, "x")
    return values, expected


def hammer(count, run, change):
    """`run` in several threads while `change` is called over and over; every error is raised here."""
    stop, errors, done = threading.Event(), [], []

    def work():
        try:
            while not stop.is_set():
                run()
                done.append(1)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for t in threads:
        t.start()
    changes = 0
    end = time.time() + SECONDS
    while time.time() < end and not errors:
        change(changes)
        changes += 1
    stop.set()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
    return len(done), changes


@pytest.mark.parametrize(("method", "budget"), [("lora", None), ("lora", 0), ("shira", None)])
def test_results_equal_one_version_while_an_adapter_is_replaced(method, budget):
    model = base("llama")
    add(model, method, "a", seed=1)
    add(model, method, "b", seed=2)
    veneer.activate(model, None)
    given, rows = inputs("llama", 4), ["a", "x", None, "x"]
    values, expected = versions(model, given, rows, method=method)
    assert not torch.equal(expected[0], expected[1])
    veneer.attach(model, _like(model), "x", values=values[0], activate=False)
    veneer.memory_budget(model, adapters=budget)
    seen = set()

    def run():
        with torch.no_grad():
            y = out(model, given, adapters=rows)
        found = [i for i, e in enumerate(expected) if torch.equal(y, e)]
        assert found, "a result of no version"
        seen.update(found)

    def change(i):
        new = values[i % len(values)]
        veneer.attach(model, _like(model), "x", values=new, activate=False, replace=True)
        time.sleep(0.001)

    done, changes = hammer(3, run, change)
    assert seen == {0, 1, 2}
    assert done > 5
    assert changes > 5


def _like(model):
    return model.veneer.adapter("a").method


def test_results_hold_while_other_adapters_come_and_go():
    model = base("llama")
    add(model, "lora", "a", seed=1)
    veneer.activate(model, None)
    given = inputs("llama", 4)
    with torch.no_grad():
        expected = out(model, given, adapters=["a", None, "a", "a"])

    def run():
        with torch.no_grad():
            assert torch.equal(out(model, given, adapters=["a", None, "a", "a"]), expected)

    def change(i):
        veneer.attach(model, ("lora", "ia3", "prefix_tuning", "vera")[i % 4], "y", activate=False)
        veneer.memory_budget(model, adapters=i % 2 * 10**6)
        veneer.detach(model, "y")

    assert hammer(3, run, change)[1] > 3


def test_the_active_adapter_may_change_and_leave():
    model = base("llama")
    for name, seed in (("stays", 0), ("a", 1), ("b", 2)):
        add(model, "lora", name, seed=seed)
    kept = {n: {k: v.clone() for k, v in model.veneer.adapter(n).named().items()} for n in ("a", "b")}
    given = inputs("llama", 2)
    with torch.no_grad():
        expected = [out(model, given, adapters=n) for n in ("a", "b", None)]

    def run():
        with torch.no_grad():
            y = out(model, given)
        assert any(torch.equal(y, e) for e in expected)

    def change(i):
        name = "ab"[i % 2]
        veneer.detach(model, name)
        veneer.attach(model, "lora", name, values=kept[name])

    assert hammer(3, run, change)[1] > 3


def test_a_name_that_left_is_an_error_and_nothing_else():
    model = base("llama")
    add(model, "lora", "a")
    add(model, "lora", "x", seed=2)
    given = inputs("llama", 2)
    values = {k: v.clone() for k, v in model.veneer.adapter("x").named().items()}
    with torch.no_grad():
        expected = out(model, given, adapters="x")
    outcomes = set()

    def run():
        try:
            with torch.no_grad():
                y = out(model, given, adapters="x")
        except UnknownAdapter:
            outcomes.add("gone")
            return
        outcomes.add("there")
        assert torch.equal(y, expected)

    def change(i):
        veneer.detach(model, "x")
        time.sleep(0.002)
        veneer.attach(model, "lora", "x", values=values, activate=False)
        time.sleep(0.002)

    hammer(2, run, change)
    assert outcomes == {"gone", "there"}


def test_the_last_adapter_leaves_when_the_calls_under_way_have_ended():
    model = base("llama")
    add(model, "lora", "a")
    given = inputs("llama", 2)
    with torch.no_grad():
        adapted = out(model, given)
        with veneer.bare(model):
            bare = out(model, given)
    handle = model.model.layers[0].register_forward_hook(lambda *_: veneer.detach(model, "a"))
    with torch.no_grad():
        assert torch.equal(out(model, given), adapted)
    handle.remove()
    assert not hasattr(model, "veneer")
    assert type(model).__mro__[1] is not type(model)
    with torch.no_grad():
        assert torch.equal(out(model, given), bare)


def test_a_generation_ends_with_the_version_that_it_began_with():
    model = base("llama")
    add(model, "lora", "a", size=0.5)
    add(model, "lora", "x", seed=1, size=0.5)
    veneer.activate(model, None)
    given = {k: v for k, v in inputs("llama", 2, padding="left").items() if k != "position_ids"}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    old = model.generate(**given, **options, adapters="x")
    values = {k: v.clone() for k, v in model.veneer.adapter("a").named().items()}
    new = model.generate(**given, **options, adapters="a")
    assert not torch.equal(old, new)
    steps = []

    def replace(*_):
        steps.append(1)
        if len(steps) == 3:
            veneer.attach(model, "lora", "x", values=values, activate=False, replace=True)
        if len(steps) == 5:
            veneer.detach(model, "x")

    handle = model.lm_head.register_forward_hook(replace)
    assert torch.equal(model.generate(**given, **options, adapters="x"), old)
    handle.remove()
    with pytest.raises(UnknownAdapter):
        model.generate(**given, **options, adapters="x")


def test_one_adapter_takes_the_place_of_another_of_another_method():
    model = base("llama")
    add(model, "lora", "x")
    given = inputs("llama", 2)
    new = veneer.attach(model, "ia3", "x", replace=True)
    with torch.no_grad():
        for leaf in new.leaves():
            leaf.add_(0.3)
        replaced = out(model, given)
    assert list(veneer.adapters(model)) == ["x"]
    assert new.leaves()[0].requires_grad
    fresh = base("llama")
    other = veneer.attach(fresh, "ia3", "x")
    with torch.no_grad():
        for leaf in other.leaves():
            leaf.add_(0.3)
        assert torch.equal(out(fresh, given), replaced)


def test_attaching_to_attention_parses_no_source(monkeypatch):
    # Python 3.11 keeps the parser's depth in a place of all threads: two that parse at once can fail.
    model, parsed, parse = base("llama"), [], ast.parse
    with monkeypatch.context() as patch:
        patch.setattr(ast, "parse", lambda *args, **kwargs: parsed.append(args) or parse(*args, **kwargs))
        add(model, "prefix_tuning", "x")
    assert parsed == []
