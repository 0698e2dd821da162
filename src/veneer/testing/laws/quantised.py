"""Law 14: an adapter over a quantised base is the adapter over what the base stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .._law import Broken, agree, differ, law
from .._subject import Subject, gradients

FORMS = ("nf4", "int8")


@law(14, "quantised")
def quantised(s: Subject) -> str:
    """Over NF4 and int8 forms of the base outputs and gradients equal those over its dequantised twin."""
    from veneer.bases import quantised as forms

    contents, worst = s.base.contents(3), 0.0
    for form in FORMS:
        coarse = s.model()
        forms.quantise_model(coarse, form)
        plain = dequantised(s.model(), coarse)
        bare = s.evaluated(coarse, contents)
        agree(bare, s.evaluated(plain, contents), f"the bare {form} base against its dequantised twin")
        results, sites = [], []
        for model in (coarse, plain):
            adapter = s.attach(model, "a", 1)
            sites.append([(sp.site.name, sp.site.module) for sp in adapter.plan.sites])
            if sites[-1] != sites[0]:
                raise Broken(f"the {form} base has other sites: {_first(*sites)}")
            output = s.evaluated(model, contents)
            differ(output, bare, "the randomised adapter changes nothing")
            adapter.generator.manual_seed(3)
            with s.training(model):
                torch.stack(s.losses(model, contents)).sum().backward()
            results.append((output, gradients(adapter)))
        (output, slopes), (expected, expected_slopes) = results
        worst = max(worst, agree(output, expected, f"over the {form} base against its dequantised twin"))
        worst = max(
            worst,
            agree(slopes, expected_slopes, f"gradients over the {form} base against its dequantised twin"),
        )
    return f"{worst:.1e}"


def _first(one: list[Any], other: list[Any]) -> str:
    only = [x for x in one if x not in other], [x for x in other if x not in one]
    return " in place of ".join(" at ".join(found[0]) if found else "nothing" for found in only)


@torch.no_grad()
def dequantised(model: nn.Module, coarse: nn.Module) -> nn.Module:
    """`model` with the dense weights of `coarse`."""
    modules = dict(model.named_modules())
    for name, layer in coarse.named_modules():
        if hasattr(layer, "dense_weight"):
            weight, W = modules[name].weight, layer.dense_weight()
            weight.copy_(W if isinstance(modules[name], nn.Linear) else W.mT)  # type: ignore[operator]
    return model
