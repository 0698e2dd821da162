"""Choosing entries of several tensors together, and putting values at them. No method: a part of sparse
methods."""

import torch
from torch import Tensor


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
