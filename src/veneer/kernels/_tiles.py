"""What kernels are given: segments cut into tiles of equal height, and factors of different rank side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HEIGHT = 16  # vectors of a tile: the least that a matrix unit takes


@dataclass(frozen=True)
class Tiles:
    """Tiles of segments, each within one: int32, one entry a tile. Those of no adapter are left out."""

    first: Tensor  # its first vector
    end: Tensor  # the vector behind its last
    slot: Tensor  # its adapter


def tiles_of(starts: Sequence[int], slots: Sequence[int], device: torch.device) -> Tiles:
    """Tiles for segments: vectors starts[s] to starts[s + 1] have the adapter slots[s], -1 being none."""
    first, end, slot = [], [], []
    for begin, stop, a in zip(starts, starts[1:], slots):
        for at in range(begin, stop, HEIGHT) if a >= 0 else ():
            first.append(at)
            end.append(min(at + HEIGHT, stop))
            slot.append(a)
    made = (torch.tensor(v, dtype=torch.int32, device=device) for v in (first, end, slot))
    return Tiles(*made)


def padded(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """(down (rank, in), up (out, rank)) of each adapter -> one tensor of each, at the largest rank, and the ranks.

    What is filled up is neither read nor multiplied: ranks say how far each goes.
    """
    ranks = [down.shape[0] for down, _ in factors]
    down, up = factors[0]
    downs = down.new_zeros(len(factors), max(ranks), down.shape[1])
    ups = up.new_zeros(len(factors), up.shape[0], max(ranks))
    for i, ((d, u), r) in enumerate(zip(factors, ranks)):
        downs[i, :r], ups[i, :, :r] = d, u
    return downs, ups, torch.tensor(ranks, dtype=torch.int32, device=down.device)
