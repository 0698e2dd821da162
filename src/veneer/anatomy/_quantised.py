"""Quantised layers, while a base is read: a plain linear layer stands in for each, so that a traced forward shows
which weight it used. The stand-in's weight is one number seen as a matrix, so no dense copy is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_quantised(module: nn.Module) -> bool:
    """What has `dense_weight()` beside its sizes is a quantised linear layer, whoever made it."""
    return callable(getattr(module, "dense_weight", None)) and hasattr(module, "in_features")


@contextmanager
def dense_stand_ins(model: nn.Module) -> Iterator[None]:
    """Inside of the block every quantised layer is a linear layer of its shape; afterwards it is itself again."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if is_quantised(child)
    ]
    try:
        for parent, name, child in places:
            parent._modules[name] = _stand_in(child)
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def _stand_in(module: Any) -> nn.Linear:
    bias = getattr(module, "bias", None)
    made = nn.Linear(int(module.in_features), int(module.out_features), bias=False, device="meta")
    one = torch.full((1, 1), 0.01, dtype=module.weight.dtype, device=module.weight.device)
    made.weight = nn.Parameter(one.expand(made.out_features, made.in_features), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made.train(module.training)
