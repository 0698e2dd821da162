"""Law 2: through the whole engine, outputs and gradients are those of an independent reference of the paper.

A reference is a module (or any object) with `cases()`, `reference(case)` and `gradients(case)`; a case
holds a frozen layer ("base": W, bias), the adapter's tensors, inputs and a cotangent, all float64. A case
becomes a model of that one layer. Where a reference names things in its own way, `place(case)` says how,
or returns None where a case is no layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer import engine

from .._law import Broken, DoesNotApply, agree, law
from .._subject import Subject, gradients

BY_DIFFERENCES = 1e-7  # a reference's gradients come from differences, which lose digits


@dataclass
class Trial:
    """A case of a reference as one layer under a method."""

    tensors: Mapping[str, Tensor]  # by the method's names
    W: Tensor
    bias: Tensor | None
    x: Tensor
    options: Mapping[str, Any] = field(default_factory=dict)
    port: str = ""  # "" is the method's own, where it has one
    training: bool = False
    x_name: str = "x"  # what the reference calls the input
    names: Mapping[str, str] = field(default_factory=dict)  # site/tensor or tensor -> the reference's name

    def name(self, key: str) -> str:
        """What the reference calls the tensor of this key."""
        tensor = key.rpartition("/")[2]
        return self.names.get(key, self.names.get(tensor, tensor))


class Layer(nn.Module):
    """One linear layer by the name of `layer`."""

    def __init__(self, W: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.layer = nn.Linear(W.shape[1], W.shape[0], bias=bias is not None, dtype=W.dtype)
        with torch.no_grad():
            self.layer.weight.copy_(W)
            if bias is not None:
                self.layer.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def place_as_layer(case: Mapping[str, Any], fields: set[str]) -> Trial | None:
    """The usual form: base W and bias with inputs x, or a state y alone. None for what is no layer."""
    inputs, base = case["inputs"], case.get("base", {})
    if "dropout_mask" in inputs or "u" in inputs or set(inputs) not in ({"x"}, {"y"}):
        return None
    name = "x" if "x" in inputs else "y"
    x = inputs[name]
    W = base.get("W", torch.eye(x.shape[-1], dtype=x.dtype) if not base else None)
    if W is None or not isinstance(W, Tensor) or W.dim() != 2 or x.dim() != 3:
        return None
    options = {k: v for k, v in case.get("options", {}).items() if k in fields}
    return Trial(
        case["tensors"], W, base.get("bias"), x, options, case.get("options", {}).get("side", ""), x_name=name
    )


@law(2, "equation")
def equation(s: Subject) -> str:
    """Outputs, gradients and penalties equal an independent float64 reference of the paper's equation."""
    if s.reference is None:
        raise DoesNotApply("no reference given")
    fields = {f.name for f in dataclasses.fields(s.method)}  # type: ignore[arg-type]
    place = s.place or (lambda case: place_as_layer(case, fields))
    worst, tried, cases = 0.0, 0, s.reference.cases()
    for case in cases:
        trial = place(case)
        if trial is not None:
            worst, tried = max(worst, _one(s, trial, case)), tried + 1
    if not tried:
        raise DoesNotApply(f"none of the reference's {len(cases)} cases is one layer")
    return f"{tried} of {len(cases)} cases, {worst:.1e}"


def _one(s: Subject, trial: Trial, case: Any) -> float:
    port = trial.port or s.method.ports[0]
    sites = {port: "layer"} if len(s.method.ports) > 1 else "layer"
    method = type(s.method)(**{"sites": sites, **trial.options})
    model = Layer(trial.W, trial.bias)
    plan = engine.plan(model, method)
    values = {}
    for key in (key for names in plan.keys for key in names.values()):
        if trial.name(key) not in trial.tensors:
            raise Broken(f"case '{case['name']}': the reference has no tensor for '{key}'")
        values[key] = trial.tensors[trial.name(key)]
    adapter = engine.attach(model, method, "a", values=values)
    x = trial.x.clone().requires_grad_()
    model.train(trial.training)
    y = model(x)
    expected, what = s.reference.reference(case), f"case '{case['name']}'"
    worst = agree(y, expected["output"], f"{what}: output against the reference")
    if "penalty" in expected:
        found = engine.penalty(model)
        agree(
            found if found is not None else torch.zeros(1),
            expected["penalty"].reshape(-1),
            f"{what}: penalty against the reference",
        )
    (y * case["cotangent"]).sum().backward()
    slopes = s.reference.gradients(case)
    found_slopes = gradients(adapter)
    for key, slope in found_slopes.items():
        known = trial.name(key)
        if known in slopes:
            agree(slope, slopes[known], f"{what}: gradient of {known} against the reference", BY_DIFFERENCES)
    if trial.x_name in slopes and x.grad is not None:
        agree(
            x.grad,
            slopes[trial.x_name],
            f"{what}: gradient of the input against the reference",
            BY_DIFFERENCES,
        )
    return worst
