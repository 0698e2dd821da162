"""A frozen linear layer and its low-rank edit as one node: the same numbers as separate operations, less kept."""

import pytest
import torch
from torch import nn

import veneer
from veneer.bases.matmul import set_matmul
from veneer.engine import _fused


class Block(nn.Module):
    """What a transformer's block does between its linears: a norm, an activation, a gate."""

    def __init__(self, act: str = "gelu", wide: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.gate, self.down = (
            nn.Linear(32, wide),
            nn.Linear(32, wide),
            nn.Linear(wide, 32, bias=False),
        )
        self.act = act

    def forward(self, x):
        h = self.norm(x)
        if self.act == "gated":
            return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        act = {"gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh}[self.act]
        return x + self.down(act(self.up(h) + 0.1 * self.gate(h)))


def made(act="gelu", blocks=2, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(act) for _ in range(blocks)]).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    veneer.attach(model, "lora", name="mine", rank=4, sites="linear", **options)
    with torch.no_grad():
        for p in trained(model):
            p.normal_(0, 0.3)
    return model.train()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    found = torch.autograd.grad(
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum(), [x, *trained(model)]
    )
    return [y.detach(), *found]


def apart(one, two):
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(one, two))


@pytest.fixture
def small(monkeypatch):
    """Inputs of any size are made again."""
    monkeypatch.setattr(_fused, "SMALL", 1)


def separately(monkeypatch):
    monkeypatch.setattr(_fused, "may_fuse", lambda x: False)


@pytest.mark.parametrize("act", ["gelu", "silu", "gated", "tanh"])
@pytest.mark.parametrize("form", ["plain", "packed"])
def test_one_node_gives_what_separate_operations_give(act, form, small, monkeypatch):
    x = torch.randn(3, 5, 32)
    model = made(act)
    set_matmul(model, form)
    ours = gradients(model, x)
    separately(monkeypatch)
    assert apart(ours, gradients(model, x)) < 2e-6


def test_it_is_exact_in_double_precision(small, monkeypatch):
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    model = made("gated", dtype=torch.float64)
    ours = gradients(model, x)
    separately(monkeypatch)
    assert apart(ours, gradients(model, x)) < 1e-13


def test_the_node_is_what_runs(small):
    model = made()
    seen = []
    y = model(torch.randn(3, 5, 32))
    todo = [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.append(node)
            todo += [n for n, _ in node.next_functions]
    assert sum(type(n).__name__ == "_FusedBackward" for n in seen) == 6


@pytest.mark.parametrize("act", ["gelu", "gated"])
def test_second_derivatives_are_those_of_separate_operations(act, small, monkeypatch):
    def twice(model):
        x = torch.linspace(-1, 1, 3 * 32, dtype=torch.float64).view(1, 3, 32).requires_grad_()
        first = torch.autograd.grad(model(x).pow(2).sum(), [x, *trained(model)], create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), [x, *trained(model)])

    model = made(act, blocks=1, dtype=torch.float64)
    ours = twice(model)
    separately(monkeypatch)
    assert apart(ours, twice(model)) < 1e-10


def test_the_input_that_an_activation_made_is_not_kept(small):
    """Of a block with a GELU: what is held for the backward beside parameters shrinks by the activation's output."""

    def held(model):
        kept = {}

        def pack(t):
            if not isinstance(t, nn.Parameter) and t.numel() >= 15 * 32:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(torch.randn(3, 5, 32, requires_grad=True))
        y.sum().backward()
        return sum(kept.values())

    model = made(blocks=1)
    ours = held(model)
    with pytest.MonkeyPatch.context() as patch:
        separately(patch)
        theirs = held(model)
    assert theirs - ours >= 4 * 15 * (64 + 32)


@pytest.mark.parametrize("how", ["dropout", "autocast", "vmap", "jvp", "trained weight", "two adapters"])
def test_it_stands_back_where_other_rules_hold(how, small, monkeypatch):
    calls = []
    apply = _fused._Fused.apply
    monkeypatch.setattr(_fused, "fused", lambda *a: calls.append(a) or apply(*a))
    model = made(**({"dropout": 0.5} if how == "dropout" else {}))
    x = torch.randn(3, 5, 32)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
    elif how == "vmap":
        torch.vmap(model)(x[:, None])
    elif how == "jvp":
        torch.func.jvp(model, (x,), (x,))
    elif how == "trained weight":
        for p in model.parameters():
            p.requires_grad_()
        model(x)
    elif how == "two adapters":
        veneer.attach(model, "lora", name="other", rank=2, sites="linear")
        veneer.activate(model, ["mine", "other"])
        model(x)
    else:
        model(x)
    assert not calls


def test_a_weight_that_changes_behind_the_forward_is_an_error():
    model = made()
    y = model(torch.randn(3, 5, 32))
    with torch.no_grad():
        model[1].up.weight.mul_(2)
    with pytest.raises(veneer.errors.VeneerError, match="changed between a forward and its backward"):
        y.sum().backward()
