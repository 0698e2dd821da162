"""Low-rank edits of a linear layer, added to its output in place: what a decoding step does at every layer.

The one idea: for a composition of rows, whatever does not depend on the input is made once: which adapters go through
one product, over which rows, in which order of memory. A call is left with two products a block. An adapter's
neighbouring rows share its tensors; ranks that are nearly alike share a product, padded with zeros, which are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._low_rank import LowRank

# About those of one CPU core, in microseconds and bytes a microsecond; only their proportion decides anything.
CALL, BYTES = 4.0, 14e3
WIDE = range(16, 64)  # ranks whose products are faster on an (in, rank) factor: half the time, measured


@dataclass(slots=True)
class Block:
    """Rows that go through one pair of products. rows: None is all of them, a slice, or an index (rows,)."""

    rows: Any
    count: int  # the adapter axis; 0: one adapter for whatever rows there are
    down: Tensor
    up: Tensor
    wide: bool


@dataclass(slots=True)
class Piece:
    """One adapter's rows. rows: None is the whole batch, however many rows that has."""

    low: LowRank
    slot: int
    rows: tuple[int, ...] | None
    level: int
    rank: int


class Adds:
    """What all edits of one linear layer add to its output."""

    __slots__ = ("blocks", "dtype", "n_in", "n_out", "total")

    def __init__(self, pieces: Sequence[Piece], total: int, n_in: int, n_out: int) -> None:
        """total: rows of the batch, where pieces have rows of their own."""
        self.n_in, self.n_out = n_in, n_out
        self.total = total if any(p.rows is not None for p in pieces) else 0
        self.blocks = [
            _block(members, rank, by_row, total)
            for members, rank, by_row in _layout(pieces, total, n_in + n_out)
        ]
        self.dtype = self.blocks[0].down.dtype

    def into(self, x: Tensor, y: Tensor) -> bool:
        """Add to y (rows, ..., out), in place; False, and y as it was, where these tensors do not fit."""
        if x.dtype != self.dtype or y.dtype != self.dtype or not y.is_contiguous():
            return False
        if self.total and x.shape[0] != self.total:
            return False
        n_in, n_out = self.n_in, self.n_out
        for block in self.blocks:
            rows, count = block.rows, block.count
            if not count:
                mine = x.reshape(-1, n_in)
                h = (block.down @ mine.mT).mT if not block.wide else mine @ block.down
                y.view(-1, n_out).addmm_(h, block.up)
                continue
            indexed = isinstance(rows, Tensor)
            mine = x if rows is None else x.index_select(0, rows) if indexed else x[rows]
            mine = mine.reshape(count, -1, n_in)
            h = torch.bmm(mine, block.down) if block.wide else torch.bmm(block.down, mine.mT).mT
            if indexed:
                y.index_add_(0, rows, torch.bmm(h, block.up).view(-1, *y.shape[1:]))
            else:
                (y if rows is None else y[rows]).view(count, -1, n_out).baddbmm_(h, block.up)
        return True


# -- which rows go together -------------------------------------------------------------------------------------------

Layout = tuple[
    list[Piece], int, bool
]  # pieces of one block, the rank that they are padded to, an axis of rows?


def _layout(pieces: Sequence[Piece], total: int, width: int) -> list[Layout]:
    """The blocks that cost least in a decoding step: calls, and bytes of the adapters."""
    whole: list[Layout] = [([p], p.rank, False) for p in pieces if p.rows is None]
    found: list[Layout] = []
    for level in sorted({p.level for p in pieces}):
        by_rank: dict[int, list[Piece]] = {}
        for p in pieces:
            if p.level == level and p.rows is not None:
                by_rank.setdefault(p.rank, []).append(p)
        groups = [(by_rank[rank], rank) for rank in sorted(by_rank)]
        plans = [_cheapest(members, rank, total, width) for members, rank in groups]
        i = 0
        while i + 1 < len(groups):  # ranks next to one another, as one
            joined = (groups[i][0] + groups[i + 1][0], groups[i + 1][1])
            plan = _cheapest(*joined, total, width)
            if plan[0] < plans[i][0] + plans[i + 1][0]:
                groups[i : i + 2], plans[i : i + 2] = [joined], [plan]
                i = max(i - 1, 0)
            else:
                i += 1
        found += [block for _, blocks in plans for block in blocks]
    return whole + found


def _cheapest(members: list[Piece], rank: int, total: int, width: int) -> tuple[float, list[Layout]]:
    """(cost, blocks): an adapter axis for each number of rows that adapters have, or one axis of rows."""
    by_count: dict[int, list[Piece]] = {}
    for p in sorted(members, key=lambda p: p.rows):  # type: ignore[arg-type, return-value]
        by_count.setdefault(len(p.rows), []).append(p)  # type: ignore[arg-type]
    axes: list[Layout] = [(same, rank, False) for same in by_count.values()]
    options = [axes, [(members, rank, True)]]
    return min(((sum(_cost(b, total, width) for b in o), o) for o in options), key=lambda found: found[0])


def _cost(block: Layout, total: int, width: int) -> float:
    members, rank, by_row = block
    order = _order(members, by_row)
    selected = 2 if isinstance(_selector(order, total, len(order) == len(members)), list) else 0
    copies = len(order) if by_row else len(members)
    return (2 + selected) * CALL + copies * rank * width * 4 / BYTES


def _order(members: Sequence[Piece], by_row: bool) -> list[int]:
    """Rows of a block, adapter by adapter, or as they stand in the batch."""
    rows = [row for p in members for row in p.rows]  # type: ignore[union-attr]
    return sorted(rows) if by_row else rows


def _selector(order: list[int], total: int, single: bool) -> slice | list[int] | None:
    """None for all rows, a slice for neighbours (where each adapter has a single row: for equal distances), else the
    rows themselves."""
    if order == list(range(total)):
        return None
    step = order[1] - order[0] if len(order) > 1 else 1
    if (step == 1 or (step > 1 and single)) and order == list(range(order[0], order[-1] + 1, step)):
        return slice(order[0], order[-1] + 1, step)
    return order


def _block(members: list[Piece], rank: int, by_row: bool, total: int) -> Block:
    wide = rank in WIDE
    if members[0].rows is None:
        down, up = members[0].low.pair(members[0].slot)
        return Block(None, 0, down.mT if wide else down, up.mT, wide)
    banks: dict[int, list[Piece]] = {}
    for p in members:
        banks.setdefault(id(p.low), []).append(p)
    made = []  # factors, in the order of banks
    for same in banks.values():
        down, up = same[0].low.factors([p.slot for p in same], wide)
        short = rank - up.shape[1]
        if short:  # zeros add nothing, exactly
            down = torch.nn.functional.pad(down, (0, short) if wide else (0, 0, 0, short))
            up = torch.nn.functional.pad(up, (0, 0, 0, short))
        made.append((down, up))
    down, up = made[0] if len(made) == 1 else [torch.cat(each) for each in zip(*made)]
    ordered = [p for same in banks.values() for p in same]
    if by_row:
        taken = sorted((row, i) for i, p in enumerate(ordered) for row in p.rows)  # type: ignore[union-attr]
        index = torch.tensor([i for _, i in taken], device=down.device)
    else:
        place = {id(p): i for i, p in enumerate(ordered)}
        index = torch.tensor([place[id(p)] for p in members], device=down.device)
    if index.tolist() != list(range(len(ordered))):
        down, up = down.index_select(0, index), up.index_select(0, index)
    order = _order(members, by_row)
    rows = _selector(order, total, len(index) == len(order))
    chosen = torch.tensor(rows, device=down.device) if isinstance(rows, list) else rows
    return Block(chosen, len(index), down, up, wide)


__all__ = ["Adds", "LowRank", "Piece"]
