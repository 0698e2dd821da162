"""Laws 4 and 9: what is trained, and that training together is training apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer import engine

from .._law import EXACT, Broken, law, same_bits
from .._subject import Subject, bits, clear, gradients

STEP = 0.05  # of plain gradient descent, in units of the largest gradient
NULL = 1e-10  # what a gradient that is zero by mathematics may be in float64


@law(4, "trains")
def trains(s: Subject) -> str:
    """Declared tensors, they alone, get gradients within two steps; counts agree; the base keeps its bits."""
    model, contents = s.model(), s.base.contents(4)
    before = bits(model)
    adapter = s.attach(model, random=False)
    _count(adapter, model)
    reached: dict[str, float] = {}
    with s.training(model):
        for _ in range(3):  # two steps, and a look at where they lead
            _backward(s, model, contents)
            for name, p in model.named_parameters():
                if p.grad is not None and not name.startswith("veneer."):
                    raise Broken(f"the base's parameter '{name}' got a gradient")
            found = gradients(adapter)
            for key, g in found.items():
                reached[key] = max(reached.get(key, 0.0), float(g.abs().max()) if g.numel() else 0.0)
            _descend(adapter)
    _judge(adapter, reached)
    after = bits(model)
    for name, value in before.items():
        same_bits(after[name], value, f"the base's '{name}' after training")
    return f"{adapter.trainable_parameters} trained"


def _count(adapter: Any, model: nn.Module) -> None:
    """Leaves, plan and declared shapes agree about the number."""
    declared: dict[str, int] = {}
    for e in adapter.plan.entries:
        if e.spec.trained:
            declared[e.key] = torch.Size(adapter.named()[e.key].shape).numel()
            fluid = bool(adapter.method.facts.data)  # a mask chosen by data has sizes of its own
            if not fluid and tuple(adapter.named()[e.key].shape) != tuple(e.shape):
                raise Broken(
                    f"'{e.key}' has shape {tuple(adapter.named()[e.key].shape)}, declared is {tuple(e.shape)}"
                )
    open_ = sum(p.numel() for p in model.parameters() if p.requires_grad)
    numbers = {
        "declared": sum(declared.values()), "in the leaves": adapter.trainable_parameters,
        "that require gradients": open_,
    }  # fmt: skip
    if len(set(numbers.values())) != 1:
        raise Broken("trained numbers disagree: " + ", ".join(f"{n} {k}" for k, n in numbers.items()))
    if not open_:
        raise Broken("nothing is trained")
    formula = adapter.plan.trainable_parameters
    if not adapter.method.facts.data and formula != open_:
        raise Broken(f"the plan forecasts {formula} trained numbers; there are {open_}")


def _backward(s: Subject, model: nn.Module, contents: Any) -> None:
    for p in model.parameters():
        p.grad = None
    loss = torch.stack(s.losses(model, contents)).sum()
    extra = engine.penalty(model)
    (loss if extra is None else loss + extra).backward()


@torch.no_grad()
def _descend(adapter: Any) -> None:
    for leaf in adapter.leaves():
        if leaf.grad is not None and leaf.numel():
            leaf -= STEP / max(1.0, float(leaf.grad.abs().max())) * leaf.grad
    adapter.project()


def _judge(adapter: Any, reached: dict[str, float]) -> None:
    optional = getattr(adapter.method, "may_be_unreached", False)
    for e in adapter.plan.entries:
        if not e.spec.trained or not adapter.named()[e.key].numel():
            continue
        largest = reached[e.key]
        if e.spec.null_gradient:
            if largest > NULL:
                raise Broken(
                    f"'{e.key}' declares a zero gradient ({e.spec.null_gradient}) and has {largest:.3g}",
                    largest,
                )
        elif largest <= NULL and not optional:
            raise Broken(
                f"'{e.key}' is trained and gets no gradient within two steps ({largest:.3g})", largest
            )


# -- law 9 --------------------------------------------------------------------------------------------------


@law(9, "cohort")
def cohort(s: Subject) -> str:
    """Gradients of adapters trained together, a row a member, equal those of separate training."""
    model = s.model()
    members = {"a": s.attach(model, "a", 1), "b": s.attach(model, "b", 2)}
    if s.other_size is not None:
        members["c"] = s.attach(model, "c", 3, method=s.other_size)
    names = ["b", "a", None, "b", *(["c"] if "c" in members else []), "a"]
    contents = s.base.contents(len(names))
    engine.activate(model, list(members))
    with s.training(model):
        _restart(members)
        with engine.rows(model, names):
            losses = s.losses(model, contents)
        torch.stack([loss for n, loss in zip(names, losses) if n is not None]).sum().backward()
        together = {n: gradients(a) for n, a in members.items()}
        worst = 0.0
        for n, adapter in members.items():
            for other in members.values():
                clear(other)
            engine.activate(model, n)
            _restart(members)
            torch.stack(s.losses(model, [c for m, c in zip(names, contents) if m == n])).sum().backward()
            worst = max(worst, _close(together[n], gradients(adapter), f"'{n}'"))
        _penalties(s, model, members, names, contents)
    return f"{worst:.1e}"


def _restart(members: dict[str, Any]) -> None:
    """Noise comes from each member's own generator; both runs begin where it began."""
    for adapter in members.values():
        adapter.generator.manual_seed(7)


def _close(found: dict[str, Tensor], expected: dict[str, Tensor], who: str) -> float:
    """Norm of the difference over the norm."""
    a, b = (torch.cat([v.flatten() for v in g.values()]) for g in (found, expected))
    if float(b.norm()) == 0.0:
        raise Broken(f"{who} gets no gradient when trained alone, so the law would see nothing", 0.0)
    error = float((a - b).norm() / b.norm())
    if not error <= EXACT:
        raise Broken(
            f"gradients of {who}, trained together, differ from separate training by {error:.3g}", error
        )
    return error


def _penalties(
    s: Subject, model: nn.Module, members: dict[str, Any], names: list[Any], contents: Any
) -> None:
    """A mixed batch adds the penalty of each member once, whatever its number of rows."""
    noisy = any(spec.noise for a in members.values() for sp in a.plan.sites for spec in sp.specs.values())
    if (
        noisy
        or not s.base.labelled
        or not any("penalty" in sp.method.arguments for a in members.values() for sp in a.plan.sites)
    ):
        return
    expected = torch.zeros(())
    for n in members:
        with engine.active(model, n):
            own = engine.penalty(model)
        expected = expected if own is None else expected + own.detach()
    engine.activate(model, list(members))
    batch = s.labelled(contents)
    with torch.no_grad():
        with engine.rows(model, names):
            _restart(members)
            with_penalty = model(**batch)["loss"]
        plain = _without_penalty(s, model, members, names, batch)
    found = float(with_penalty - plain)
    wanted = float(expected)
    if abs(found - wanted) > 1e-6 * max(1.0, abs(wanted)):
        raise Broken(
            f"the penalties of a mixed batch add {found:.6g} to the loss; its members' are {wanted:.6g}",
            found - wanted,
        )


def _without_penalty(s: Subject, model: nn.Module, members: Any, names: Any, batch: Any) -> Tensor:
    """The same loss in evaluation mode, where there are no penalties."""
    model.eval()
    with engine.rows(model, names):
        loss = model(**batch)["loss"]
    model.train()
    return loss
