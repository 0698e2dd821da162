"""What the contract must carry in training: cohorts, checkpointing, ranks and masks that change, other precisions."""

import pytest
import torch

import veneer
from engine_tools import add, base, inputs, out
from veneer.edits import registry
from veneer.engine import between_steps, parameters, prepare_training
from veneer.errors import NoSiteFound, NotPrepared, Unsupported

NOT_HERE = {"linear_probe", "fish_mask", "adapter_fusion", "q_peft"}


def loss_of(model, given, weights):
    y = out(model, given, **({"use_cache": False} if hasattr(model.config, "use_cache") else {}))
    return ((y**2).flatten(1).mean(1) * weights).sum()


def gradients(model, name):
    return [p.grad.clone() for p in veneer.adapters(model)[name].leaves() if p.grad is not None]


def clear(model):
    for adapter in veneer.adapters(model).values():
        for leaf in adapter.leaves():
            leaf.grad = None
            leaf.requires_grad_(True)


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "vit"])
def test_a_cohort_step_has_the_gradients_of_separate_steps(family):
    model = base(family)
    names = []
    for key in registry():
        if key in NOT_HERE or (family == "t5" and key in ("full", "diff_pruning")):
            continue
        try:
            add(model, key, key, size=0.1)
            names.append(key)
        except (NoSiteFound, Unsupported):
            pass
    given = inputs(family, len(names))
    model.train()
    clear(model)
    weights = torch.linspace(1, 2, len(names), dtype=torch.float64)
    torch.manual_seed(0)
    with veneer.rows(model, names):
        loss_of(model, given, weights).backward()
    together = {n: gradients(model, n) for n in names}
    for i, name in enumerate(names):
        if name == "diff_pruning":  # its gates are drawn for each call
            continue
        clear(model)
        with veneer.rows(model, [name]):
            loss_of(model, {k: v[i : i + 1] for k, v in given.items()}, weights[i : i + 1]).backward()
        for a, b in zip(gradients(model, name), together[name]):
            assert (a - b).norm() <= 1e-9 * max(1.0, float(b.norm())), name
            assert b.norm() > 0, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient_of_a_mixed_batch(reentrant):
    model = base("llama")
    names = ["lora", "prefix_tuning", "loreft", "serial_adapter", "ia3", "hyperformer"]
    for name in names:
        add(model, name, name, size=0.1)
    given = inputs("llama", len(names), padding="left")
    weights = torch.linspace(1, 2, len(names), dtype=torch.float64)
    model.train()
    found = []
    for on in (False, True):
        clear(model)
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        with veneer.rows(model, names):
            loss_of(model, given, weights).backward()
        found.append({n: gradients(model, n) for n in names})
    for name in names:
        for a, b in zip(found[0][name], found[1][name]):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_adalora_prunes_while_it_trains_and_merges_at_any_rank():
    model = base("bert")
    veneer.attach(model, "adalora", name="early")
    with pytest.raises(NotPrepared, match="total_steps"):
        prepare_training(model)
    veneer.detach(model, "early")
    add(model, "adalora", "a", size=0.1, init_r=4, target_rank=1, total_steps=8)
    given, labels = inputs("bert", 4), torch.tensor([0, 1, 0, 1])
    model.train()
    optimizer = torch.optim.AdamW(parameters(model, lr=1e-2))
    ranks = []
    for step in range(1, 9):
        model(**given, labels=labels).loss.backward()
        optimizer.step()
        between_steps(model, step, 8, optimizer)
        optimizer.zero_grad()
        ranks.append(sum(int((v != 0).sum()) for k, v in veneer.trainable(model).items() if k.endswith("/E")))
    model.eval()
    assert ranks[0] > ranks[-1] == 1 * len([k for k in veneer.trainable(model) if k.endswith("/E")])
    y = out(model, given)
    report = veneer.merge(model, probe=given)
    assert report.relative_error < 1e-9
    torch.testing.assert_close(out(model, given), y, atol=1e-10, rtol=0)


def test_a_start_that_needs_data_says_so_and_then_has_it(tmp_path):
    model = base("bert")
    veneer.attach(model, "fish_mask", name="late")
    with pytest.raises(NotPrepared, match="data="):
        out(model, inputs("bert", 2))
    with pytest.raises(NotPrepared, match="data="):
        veneer.save(model, "late", tmp_path / "late")
    veneer.detach(model, "late")
    batch = {**inputs("bert", 6), "labels": torch.tensor([0, 1, 0, 1, 1, 0])}
    adapter = add(model, "fish_mask", "f", data=[batch], keep_ratio=0.01)
    bare = out(model, inputs("bert", 3), adapters=None)
    y = out(model, inputs("bert", 3))
    assert (y - bare).abs().max() > 1e-7
    assert adapter.trainable_parameters < 0.02 * sum(p.numel() for p in model.parameters())
    veneer.save(model, "f", tmp_path / "f")
    other = base("bert")
    veneer.load(other, tmp_path / "f")
    torch.testing.assert_close(out(other, inputs("bert", 3)), y, atol=0, rtol=0)


@pytest.mark.parametrize("quantise", ["nf4", "int8"])
@pytest.mark.parametrize("key", ["dora", "vera", "oft", "ia3", "loreft", "prefix_tuning", "lora"])
def test_adapters_over_a_quantised_base_equal_those_over_its_dense_twin(key, quantise):
    from veneer.bases.quantised import quantise_model

    model = base("llama", double=False)
    quantise_model(model, quantise)
    twin = base("llama", double=False)
    for name, module in model.named_modules():
        if hasattr(module, "dense_weight"):
            twin.get_submodule(name).weight.data.copy_(module.dense_weight())
    given = inputs("llama", 3, padding="left")
    for m in (model, twin):
        add(m, key, "a", size=0.1)
    got, expected = out(model, given), out(twin, given)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert (got - out(model, given, adapters=None)).abs().max() > 1e-5
    with veneer.rows(model, ["a", None, "a"]):
        torch.testing.assert_close(out(model, given)[0], got[0], atol=1e-5, rtol=1e-4)


def test_merging_into_a_quantised_base_asks_and_gives_every_code_back():
    from veneer.bases.quantised import quantise_model

    model = base("llama", double=False)
    quantise_model(model, "nf4")
    add(model, "lora", "a")
    before = {n: b.clone() for n, b in model.named_buffers() if "veneer" not in n}
    with pytest.raises(Unsupported, match="requantise=True"):
        veneer.merge(model)
    veneer.merge(model, "a", requantise=True)
    assert any(not torch.equal(b, before[n]) for n, b in model.named_buffers() if n in before)
    veneer.unmerge(model)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers() if n in before)


def test_merging_one_of_two_leaves_the_other_what_it_was():
    model, given = base("bert"), inputs("bert", 3)
    add(model, "lora", "a", seed=1)
    add(model, "dora", "b", seed=2)
    bits = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("veneer")}
    veneer.activate(model, ["a", "b"])
    both = out(model, given)
    veneer.merge(model, "a")
    torch.testing.assert_close(out(model, given), both, atol=1e-10, rtol=0)
    veneer.merge(model, "b")
    torch.testing.assert_close(out(model, given), both, atol=1e-10, rtol=0)
    veneer.unmerge(model)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in bits.items())
    torch.testing.assert_close(out(model, given), both, atol=1e-10, rtol=0)
