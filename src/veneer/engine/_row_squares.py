"""Squared gradients of every row from one backward of a batch, where the layers are such that it can be.

A layer's weight gradient of one row is a product of what went in and what came back: G = sum over positions of g x^T.
So a forward and backward of the whole batch, which touch no weight, give the G of every row, one after the other, each
squared while it is still in the cache; and an embedding's gradient has the rows of its own few words alone.

Nothing is assumed: before it is used, the first two rows are taken both ways and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

Sums = dict[int, Tensor]  # by the parameter's id
Add = Callable[[Any, "Sums", Tensor, Tensor], None]
TOLERANCE = 1e-4  # of a tensor's squares: sums of float32 in another order are far below it
EXACT = torch.float32, torch.float64
NOISE = 1e-9  # of the largest tensor's: gradients that are zero but for rounding


def layers_of(root: nn.Module, parameters: Sequence[Tensor]) -> list[nn.Module] | None:
    """The layers that hold `parameters`, or None where one is no layer's of a known kind, or that of several."""
    wanted = {id(p) for p in parameters}
    found: list[nn.Module] = []
    held: list[int] = []
    for module in root.modules():
        mine = [id(p) for p in module.parameters(recurse=False) if id(p) in wanted]
        if not mine:
            continue
        if _kind(module) is None or any(p.dtype not in EXACT for p in module.parameters(recurse=False)):
            return None
        found.append(module)
        held += mine
    return found if len(held) == len(set(held)) == len(wanted) else None


def is_by_rows(batch: Mapping[str, Any]) -> bool:
    """Whether the batch's loss can be the mean of its rows' own losses: one label a row, none left out."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 1 or len(labels) < 2:
        return False
    return labels.is_floating_point() or bool((labels >= 0).all())


def agrees(exact: Sums, found: Sums) -> bool:
    """Whether the two are the same but for rounding."""
    top = max(float(value.norm()) for value in exact.values())
    return all(
        float((found[key] - value).norm()) <= TOLERANCE * float(value.norm()) + NOISE * top
        for key, value in exact.items()
    )


def add_batch(root: nn.Module, layers: Sequence[nn.Module], batch: Mapping[str, Any], sums: Sums) -> bool:
    """Add the squared gradients of every row to `sums`; False, and nothing added, where a layer ran otherwise."""
    rows = len(batch["labels"])
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    odd: list[nn.Module] = []

    def keep(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.dim() and len(x) == 1:  # the same for all rows, as positions are
            x, out = x.expand(rows, *x.shape[1:]), out.expand(rows, *out.shape[1:])
        if module in seen or not isinstance(x, Tensor) or len(x) != rows or len(out) != rows:
            odd.append(module)
        else:
            seen[module] = x.detach(), out
        return out

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(keep).remove)
        loss = root(**batch).loss
    if odd:
        return False
    outputs = [out for _, out in seen.values()]
    grads = torch.autograd.grad(rows * loss, outputs, allow_unused=True)  # of the sum, not of the mean
    with torch.no_grad():
        for (module, (x, _)), g in zip(seen.items(), grads):
            if g is not None:
                kind = _kind(module)
                assert kind is not None
                kind(module, sums, x, g)
    return True


# -- kinds of layers: (layer, sums, what went in (rows, ..., in), what came back (rows, ..., out)) ------------------


def _linear(layer: Any, sums: Sums, x: Tensor, g: Tensor) -> None:
    _product(sums.get(id(layer.weight)), g, x)
    _bias(layer.bias, sums, g)


def _transposed(layer: Any, sums: Sums, x: Tensor, g: Tensor) -> None:
    """A weight that is stored (in, out)."""
    _product(sums.get(id(layer.weight)), x, g)
    _bias(layer.bias, sums, g)


def _product(total: Tensor | None, left: Tensor, right: Tensor) -> None:
    """Add (left^T right)^2 of each row: left (rows, ..., m), right (rows, ..., n), total (m, n)."""
    if total is None:
        return
    if left.dim() == 2:  # a single position: the square of an outer product
        total.addmm_(left.square().mT, right.square())
        return
    one = torch.empty_like(total)
    for a, b in zip(left.flatten(1, -2), right.flatten(1, -2)):
        torch.mm(a.mT, b, out=one)
        total.addcmul_(one, one)


def _bias(bias: Tensor | None, sums: Sums, g: Tensor) -> None:
    if bias is not None and id(bias) in sums:
        sums[id(bias)].add_(_rows_sum(g).square().sum(0))


def _rows_sum(g: Tensor) -> Tensor:
    """(rows, ..., n) -> (rows, n)"""
    return g.flatten(1, -2).sum(1) if g.dim() > 2 else g


def _embedding(layer: Any, sums: Sums, x: Tensor, g: Tensor) -> None:
    total = sums[id(layer.weight)]
    words, rows = x.flatten(1), torch.arange(len(x), device=x.device)
    places, which = (words + rows[:, None] * len(total)).flatten().unique(return_inverse=True)
    each = g.new_zeros(len(places), total.shape[1]).index_add_(0, which, g.reshape(-1, total.shape[1]))
    words = places % len(total)
    if layer.padding_idx is not None:  # which has no gradient
        each[words == layer.padding_idx] = 0
    total.index_add_(0, words, each.square_())


def _layer_norm(layer: Any, sums: Sums, x: Tensor, g: Tensor) -> None:
    if layer.weight is not None and id(layer.weight) in sums:
        even = nn.functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        sums[id(layer.weight)].add_(_rows_sum(even * g).square().sum(0))
    _bias(layer.bias, sums, g)


def _kind(module: nn.Module) -> Add | None:
    if isinstance(module, nn.Linear):
        return _linear
    if isinstance(module, nn.Embedding):
        plain = module.max_norm is None and not module.sparse and not module.scale_grad_by_freq
        return _embedding if plain else None
    if isinstance(module, nn.LayerNorm):
        return _layer_norm if len(module.normalized_shape) == 1 else None
    # transformers' layer of GPT-2, by its shape: `import veneer` needs torch alone.
    if any(cls.__name__ == "Conv1D" and hasattr(module, "nf") for cls in type(module).__mro__):
        return _transposed
    return None
