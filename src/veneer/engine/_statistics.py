"""Statistics of a base over data, for starts that need them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.anatomy import Site
from veneer.errors import BadData, Unsupported

from ._row_squares import Sums, add_batch, agrees, is_by_rows, layers_of
from ._weights import cut

ROWS = 8  # of one backward: more would gain little, and hold as many rows' activations


class Batches(list[Mapping[str, Any]]):
    """Batches that several starts are made from. What was found is kept, and is found again for the same weights.

    Only the last is kept. A head that is drawn anew makes other weights, and another pass.
    """

    def __init__(self, batches: Iterable[Mapping[str, Any]] = ()) -> None:
        super().__init__(batches)
        self.kept: tuple[str, dict[str, Tensor]] = "", {}


def squared_gradients(
    host: Any, sites: Sequence[Site], data: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Sum over rows of the squared gradient of each row's own loss (the empirical Fisher, batch size one).

    data: batches that the model takes, labels included. Returns {site name: tensor of W's shape}. A batched gradient
    would square the sum in place of summing the squares; `_row_squares` takes a batch's rows apart where it can.
    """
    owners = [host.root.get_submodule(s.module) if s.module else host.root for s in sites]
    if any(hasattr(m, "dense_weight") for m in owners):
        raise Unsupported(
            "this base is quantised, and its codes have no gradients to square.",
            next_step="prepare the adapter on the base before it is quantised, save it, and load it here",
        )
    if not isinstance(data, Batches):
        return _pass(host, sites, owners, data)
    key = _digest(host, sites)
    if data.kept[0] != key:
        data.kept = key, _pass(host, sites, owners, data)
    return dict(data.kept[1])


def _digest(host: Any, sites: Sequence[Site]) -> str:
    """What the statistics depend on beside the data: the sites, and the content of every weight and buffer."""
    found = hashlib.sha256(repr([s.name for s in sites]).encode())
    for name, value in (*host.root.named_parameters(), *host.root.named_buffers()):
        if name.startswith("veneer."):  # adapters are not active in the pass
            continue
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _pass(
    host: Any, sites: Sequence[Site], owners: Sequence[Any], data: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
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
    training, active = host.root.training, host.active
    host.root.eval()
    host.active = ()
    try:
        for p in unique:
            p.requires_grad_(True)
        with torch.enable_grad():
            rows = _add_all(host.root, unique, data, sums)
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


def _add_all(root: Any, parameters: Sequence[Tensor], data: Iterable[Mapping[str, Any]], sums: Sums) -> int:
    """Add the squares of all rows to `sums`; returns how many rows there were."""
    layers = layers_of(root, parameters)
    looked_at, count = False, 0
    for batch in data:
        for part in _parts(batch, ROWS):
            rows = _length(part)
            count += rows
            is_able = layers is not None and is_by_rows(part)
            if layers is not None and is_able and not looked_at:
                looked_at = True
                if not _same_both_ways(root, layers, parameters, part):
                    layers = None
            if layers is None or not is_able or not add_batch(root, layers, part, sums):
                for row in _parts(part, 1):
                    _add_row(root, parameters, row, sums)
    return count


def _same_both_ways(
    root: Any, layers: Sequence[Any], parameters: Sequence[Tensor], part: Mapping[str, Any]
) -> bool:
    """Whether two rows together give what they give one by one."""
    two = next(_parts(part, 2))
    exact: Sums = {id(p): torch.zeros_like(p) for p in parameters}
    found: Sums = {id(p): torch.zeros_like(p) for p in parameters}
    for row in _parts(two, 1):
        _add_row(root, parameters, row, exact)
    return add_batch(root, layers, two, found) and agrees(exact, found)


def _add_row(root: Any, parameters: Sequence[Tensor], row: Mapping[str, Any], sums: Sums) -> None:
    """The definition: the squared gradient of one row's own loss."""
    for p, g in zip(parameters, torch.autograd.grad(root(**row).loss, parameters, allow_unused=True)):
        if g is not None:
            sums[id(p)].addcmul_(g, g)


def _length(batch: Mapping[str, Any]) -> int:
    return max(v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim())


def _parts(batch: Mapping[str, Any], rows: int) -> Iterator[dict[str, Any]]:
    """The batch by `rows` at a time."""
    count = _length(batch)
    for i in range(0, count, rows):
        yield {
            k: v[i : i + rows] if isinstance(v, Tensor) and v.dim() and v.shape[0] == count else v
            for k, v in batch.items()
        }
