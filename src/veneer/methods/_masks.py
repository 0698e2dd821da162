"""Choosing entries of several tensors together, and putting values at them. No method: a part of sparse
methods."""

from functools import partial

import torch
from torch import Tensor

from veneer.edits import Spec


def largest(scores: list[Tensor], k: int) -> list[Tensor]:
    """For each tensor of scores (n,) the indices of its entries among the k largest of all, in rising order.

    Of equal scores the first win, in the order of the tensors.
    """
    threshold = torch.cat(scores).topk(k).values[-1]
    left = k - sum(int((score > threshold).sum()) for score in scores)
    found = []
    for score in scores:
        ties = (score == threshold).nonzero().flatten()[:left]
        left -= len(ties)
        found.append(torch.cat([(score > threshold).nonzero().flatten(), ties]).sort().values)
    return found


def scatter(index: Tensor, values: Tensor, W: Tensor) -> Tensor:
    """Zeros of W's shape with values (k,) at flat indices (k,). Rows: (rows, 1, k) -> (rows, *W.shape)."""
    flat = values.new_zeros(*values.shape[:-1], W.numel()).scatter(-1, index, values)
    if W.dim() == 1:
        return flat
    return flat.view(*values.shape[:-2], *W.shape)


def drawn_places(k: int, entries: int, seed: int, rising: bool = False) -> Spec:
    """k of `entries` flat indices, the first of a random order that the seed alone makes: frozen, int64 (k,)."""
    return Spec((k,), partial(_draw_places, entries, seed, rising), trained=False)


def _draw_places(entries: int, seed: int, rising: bool, shape: tuple[int, ...], _: torch.Generator) -> Tensor:
    order = torch.randperm(entries, generator=torch.Generator().manual_seed(seed))[: shape[-1]]
    return order.sort().values if rising else order
