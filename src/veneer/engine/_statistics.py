"""Statistics of a base over data, for starts that need them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.anatomy import Site
from veneer.errors import BadData, Unsupported

from ._weights import cut


def squared_gradients(
    host: Any, sites: Sequence[Site], data: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Sum over rows of the squared gradient of each row's own loss (the empirical Fisher, batch size one).

    data: batches that the model takes, labels included. Returns {site name: tensor of W's shape}. A batched gradient
    would square the sum in place of summing the squares.
    """
    owners = [host.root.get_submodule(s.module) if s.module else host.root for s in sites]
    if any(hasattr(m, "dense_weight") for m in owners):
        raise Unsupported(
            "this base is quantised, and its codes have no gradients to square.",
            next_step="prepare the adapter on the base before it is quantised, save it, and load it here",
        )
    parameters = []
    for s, m in zip(sites, owners):
        owner: Any = m
        *path, last = s.parameter.split(".")
        for step in path:
            owner = getattr(owner, step)
        parameters.append(getattr(owner, last))
    unique = list({id(p): p for p in parameters}.values())
    sums = {id(p): torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in unique}
    flags = [p.requires_grad for p in unique]
    training, active, rows = host.root.training, host.active, 0
    host.root.eval()
    host.active = ()
    try:
        for p in unique:
            p.requires_grad_(True)
        with torch.enable_grad():
            for batch in data:
                for row in _rows(batch):
                    loss = host.root(**row).loss
                    grads = torch.autograd.grad(loss, unique, allow_unused=True)
                    rows += 1
                    for p, g in zip(unique, grads):
                        if g is not None:
                            sums[id(p)].addcmul_(g, g)
    finally:
        for p, flag in zip(unique, flags):
            p.requires_grad_(flag)
        host.root.train(training)
        host.active = active
    if not rows:
        raise BadData(
            "data= holds no row, and the start of this method is made from rows with labels.",
            next_step="data=[{'input_ids': ..., 'labels': ...}, ...]",
        )
    return {s.name: cut(sums[id(p)], s) for s, p in zip(sites, parameters)}


def _rows(batch: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    count = max(v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim())
    for i in range(count):
        yield {
            k: v[i : i + 1] if isinstance(v, Tensor) and v.dim() and v.shape[0] == count else v
            for k, v in batch.items()
        }
