"""Law 3: the two forms of a weight edit are one function."""

from typing import Any

import torch
from torch import Tensor

from veneer import engine
from veneer.edits import At, Tensors, call, delta_of

from .._law import DoesNotApply, agree, differ, law
from .._subject import Subject

FACTORED = ("linear", "conv1d")  # kinds at which the engine uses `branch`


@law(3, "one_form")
def one_form(s: Subject) -> str:
    """`branch` equals the dense `delta`, forward and gradient, at every kind of site."""
    arguments = s.method.arguments
    if "branch" not in arguments or not {"delta", "weight"} & set(arguments):
        have = [f for f in ("delta", "weight", "branch") if f in arguments]
        raise DoesNotApply(f"one form only: {have[0]}" if have else "no weight is edited")
    model = s.model()
    adapter = s.attach(model)
    host = engine.host_of(model)
    worst, seen = 0.0, set()
    for sp, names in zip(adapter.plan.sites, adapter.plan.keys):
        if (
            sp.site.kind not in FACTORED
            or sp.site.experts
            or sp.site.port != "weight"
            or len(sp.site.shape) != 2
        ):
            continue
        if not {"branch"} & set(sp.method.arguments) or (sp.site.shape, sp.site.role) in seen:
            continue
        seen.add((sp.site.shape, sp.site.role))
        values = {**adapter.named(), **adapter.frozen(host.shared)}
        weight = host.weight(sp.site)
        assert weight is not None  # a site of these kinds has one
        W = weight.detach()
        t = {n: _cast(values[k][tuple(slice(0, d) for d in sp.specs[n].shape)], W) for n, k in names.items()}
        worst = max(worst, _compare(sp.method, t, W, sp.site))
    if not seen:
        raise DoesNotApply(f"no site here of a kind that `branch` serves ({', '.join(FACTORED)})")
    return f"{worst:.1e}"


def _cast(value: Tensor, W: Tensor) -> Tensor:
    return value.to(W.dtype) if value.is_floating_point() else value


def _compare(m: Any, t: dict[str, Tensor], W: Tensor, site: Any) -> float:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, W.shape[1], generator=draw, dtype=W.dtype)
    cotangent = torch.randn(2, 3, W.shape[0], generator=draw, dtype=W.dtype)
    results = []
    for form in ("branch", "dense"):
        leaves = {n: v.clone().requires_grad_(v.is_floating_point()) for n, v in t.items()}
        z = x.clone().requires_grad_()
        tensors = Tensors(leaves)
        if "derive" in m.arguments:
            tensors = tensors.with_(**call(m, "derive", tensors, {"W": W, "at": At(site=site)}))
        if form == "branch":
            dy = call(m, "branch", tensors, {"x": z, "y": z @ W.mT, "at": At(site=site)})
        else:
            dy = z @ delta_of(m, tensors, W).mT
            shift = m.bias_delta(tensors) if hasattr(m, "bias_delta") else None
            dy = dy if shift is None else dy + shift
        wanted = {**{n: v for n, v in leaves.items() if v.requires_grad}, "x": z}
        found = torch.autograd.grad((dy * cotangent).sum(), list(wanted.values()), allow_unused=True)
        zeros = [torch.zeros_like(v) if g is None else g for v, g in zip(wanted.values(), found)]
        results.append((dy, dict(zip(wanted, zeros))))
    (branch, by_branch), (dense, by_dense) = results
    differ(dense, torch.zeros_like(dense), f"at '{site.name}' the randomised update is nothing", 0.0)
    worst = agree(branch, dense, f"`branch` against the dense form at '{site.name}'")
    for n, g in by_dense.items():
        if bool(g.any()) or bool(by_branch[n].any()):
            worst = max(
                worst,
                agree(
                    by_branch[n], g, f"gradient of {n} by `branch` against the dense form at '{site.name}'"
                ),
            )
    return worst
