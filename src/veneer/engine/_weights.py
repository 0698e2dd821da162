"""Reading weights through the base's form: the dense W of a site, in the shape in which a method sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.anatomy import Site


def stored(module: nn.Module, parameter: str) -> Tensor:
    """The parameter as the module has it (dotted names reach children); dense for quantised forms."""
    owner: Any = module
    *path, last = parameter.split(".")
    for step in path:
        owner = getattr(owner, step)
    if last == "weight" and hasattr(owner, "dense_weight"):
        return owner.dense_weight()
    return getattr(owner, last)


def cut(W: Tensor, site: Site) -> Tensor:
    """The stored parameter -> the site's W: (out, in), its own output rows only."""
    if site.transposed:
        W = W.mT
    if not site.ranges:
        return W
    axis = 1 if site.experts else 0
    parts = [W.narrow(axis, a, b - a) for a, b in site.ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def paste(stored_W: Tensor, new: Tensor, site: Site) -> Tensor:
    """The stored parameter with the site's W replaced by `new` (in the method's shape)."""
    if not site.ranges:
        return (new.mT if site.transposed else new).to(stored_W.dtype)
    W = stored_W.mT if site.transposed else stored_W
    axis = 1 if site.experts else 0
    W = W.index_copy(axis, features(site, W.device), new.to(W.dtype))
    return W.mT if site.transposed else W


def features(site: Site, device: Any) -> Tensor:
    """The output features of a fused projection that belong to the site: (n,) int64."""
    return torch.cat([torch.arange(a, b, device=device) for a, b in site.ranges])
