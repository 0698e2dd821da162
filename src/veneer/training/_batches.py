"""Which rows make which batch: by length, so that little is padding, and by the seed of the epoch alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from veneer.training._seeds import generator
from veneer.training._settings import Settings

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


class Plan:
    """Which rows each step trains on: a function of the step alone, kept an epoch at a time."""

    def __init__(self, rows: Sequence[dict[str, Any]], settings: Settings) -> None:
        self.settings = settings
        self.lengths = [f["length"] for f in rows]
        self.tokens = [f.get("tokens", f["length"]) for f in rows]
        self.steps_an_epoch = math.ceil(len(rows) / settings.batch_size)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self.total_steps = self._count()

    def indices(self, step: int) -> list[int]:
        epoch, at = divmod(step, self.steps_an_epoch)
        if self._epoch[0] != epoch:
            s = self.settings
            self._epoch = (epoch, epoch_batches(self.lengths, s.batch_size, s.seed, epoch))
        return self._epoch[1][at]

    def _count(self) -> int:
        s = self.settings
        if s.max_steps is not None:
            return s.max_steps
        if s.max_tokens is None:
            return math.ceil(s.epochs * self.steps_an_epoch)
        steps = tokens = 0
        while tokens < s.max_tokens:
            tokens += sum(self.tokens[i] for i in self.indices(steps))
            steps += 1
        return steps


def in_order(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches for evaluation: by length, longest first, so that too little memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


def parts(rows: Sequence[T], count: int) -> list[Sequence[T]]:
    """`rows` in up to `count` pieces of nearly equal size, none empty."""
    size = -(-len(rows) // max(1, count))
    return [rows[at : at + size] for at in range(0, len(rows), size)]
