"""Which rows make which batch: by length, so that little is padding, and by the seed of the epoch alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from veneer.training._seeds import generator

T = TypeVar("T")
SORTED_TOGETHER = 50  # batches whose rows are sorted by length together; more is less padding, less chance


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of one epoch in batches, every row once.

    Rows are shuffled, sorted by length within stretches of 50 batches, cut, and the batches shuffled. The
    last batch of the shuffled rows may be small; it is not dropped, since small data would lose much of
    itself.
    """
    order = generator(seed, "order", epoch)
    shuffled = torch.randperm(len(lengths), generator=order).tolist()
    stretch, batches = batch_size * SORTED_TOGETHER, []
    for start in range(0, len(shuffled), stretch):
        rows = sorted(shuffled[start : start + stretch], key=lambda i: lengths[i])
        batches += [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=order).tolist()]


def in_order(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches for evaluation: by length, longest first, so that too little memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


def parts(rows: Sequence[T], count: int) -> list[Sequence[T]]:
    """`rows` in up to `count` pieces of nearly equal size, none empty."""
    size = -(-len(rows) // max(1, count))
    return [rows[at : at + size] for at in range(0, len(rows), size)]
