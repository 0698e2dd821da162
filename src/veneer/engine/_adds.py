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
FEW = 8  # tokens of a row: above, rows are not copied to save calls
WIDE = range(16, 64)  # ranks whose products are faster on an (in, rank) factor: half the time, measured


@dataclass(slots=True)
class Piece:
    """One adapter's rows. rows: None is the whole batch, however many rows that has."""

    low: LowRank
    slot: int
    rows: tuple[int, ...] | None
    level: int
    rank: int


@dataclass(slots=True)
class Block:
    """Rows that go through one pair of products. down: (count, in, rank) where `wide`, else (count, rank, in); up:
    (count, rank, out). rows: where they are, if that is a slice. For a whole batch of one adapter there is no count."""

    count: int
    down: Tensor
    up: Tensor
    wide: bool
    rows: slice | None = None

    def narrow(self, x: Tensor) -> Tensor:
        """(rows, ..., in) -> (count, vectors of each, rank)"""
        if x.dim() != 3 or x.shape[0] != self.count:
            x = x.reshape(self.count, -1, x.shape[-1])
        return torch.bmm(x, self.down) if self.wide else torch.bmm(self.down, x.mT).mT

    def add(self, x: Tensor, y: Tensor) -> None:
        """x: (rows, ..., in), y: (rows, ..., out), in place."""
        h = self.narrow(x)
        into = y if y.dim() == 3 and y.shape[0] == self.count else y.view(self.count, -1, y.shape[-1])
        into.baddbmm_(h, self.up)


class Group:
    """Blocks of different rows, which lie one after the other in the batch, or are picked out of it together."""

    __slots__ = ("blocks", "index", "sizes", "slices", "span")

    def __init__(self, blocks: list[Block], orders: list[list[int]], total: int) -> None:
        order = [row for rows in orders for row in rows]
        self.blocks, self.sizes = blocks, [len(rows) for rows in orders]
        for block, rows in zip(blocks, orders):
            block.rows = _slice(rows, len(rows) == block.count)
        self.span = _slice(order, False)
        if len(blocks) == 1:
            self.span = blocks[0].rows
        if self.span == slice(0, total, 1):
            self.span = slice(None)
        self.slices = all(block.rows is not None for block in blocks)
        self.index: Any = torch.tensor(order, device=blocks[0].down.device) if self.span is None else None

    def add(self, x: Tensor, y: Tensor) -> None:
        if self.span is not None:
            if self.span.start is not None:
                x, y = x[self.span], y[self.span]
            if len(self.blocks) == 1:
                self.blocks[0].add(x, y)
                return
            for block, mine, into in zip(self.blocks, x.split(self.sizes), y.split(self.sizes)):
                block.add(mine, into)
        elif self.slices and x.numel() > FEW * x.shape[0] * x.shape[-1]:
            for block in self.blocks:
                block.add(x[block.rows], y[block.rows])
        else:
            parts = x.index_select(0, self.index).split(self.sizes)
            made = [
                torch.bmm(b.narrow(mine), b.up).view(-1, *y.shape[1:]) for b, mine in zip(self.blocks, parts)
            ]
            y.index_add_(0, self.index, made[0] if len(made) == 1 else torch.cat(made))


class Adds:
    """What all edits of one linear layer add to its output."""

    __slots__ = ("dtype", "groups", "n_in", "n_out", "total", "whole")

    def __init__(self, pieces: Sequence[Piece], total: int, n_in: int, n_out: int) -> None:
        """total: rows of the batch, where pieces have rows of their own."""
        self.n_in, self.n_out = n_in, n_out
        self.whole = [_single(p) for p in pieces if p.rows is None]
        rowed = [p for p in pieces if p.rows is not None]
        self.total = total if rowed else 0
        self.groups = []
        for level in sorted({p.level for p in rowed}):
            layout = _layout([p for p in rowed if p.level == level], n_in + n_out)
            layout.sort(key=lambda found: _order(found)[0])
            self.groups.append(Group([_block(b) for b in layout], [_order(b) for b in layout], total))
        self.dtype = (self.whole or self.groups[0].blocks)[0].down.dtype

    @property
    def blocks(self) -> list[Block]:
        return [*self.whole, *(block for group in self.groups for block in group.blocks)]

    def into(self, x: Tensor, y: Tensor) -> bool:
        """Add to y (rows, ..., out), in place; False, and y as it was, where these tensors do not fit."""
        if x.dtype != self.dtype or y.dtype != self.dtype or not y.is_contiguous():
            return False
        if self.total and x.shape[0] != self.total:
            return False
        for block in self.whole:
            flat = x.reshape(-1, self.n_in)
            h = flat @ block.down if block.wide else (block.down @ flat.mT).mT
            y.view(-1, self.n_out).addmm_(h, block.up)
        for group in self.groups:
            group.add(x, y)
        return True


# -- which rows go together -------------------------------------------------------------------------------------------

# pieces of one block, the rank that they are padded to, whether it has an axis of rows
Layout = tuple[list[Piece], int, bool]


def _layout(pieces: Sequence[Piece], width: int) -> list[Layout]:
    """The blocks that cost least in a decoding step: calls, and bytes of the adapters."""
    by_rank: dict[int, list[Piece]] = {}
    for p in pieces:
        by_rank.setdefault(p.rank, []).append(p)
    groups = [(by_rank[rank], rank) for rank in sorted(by_rank)]
    plans = [_cheapest(*group, width) for group in groups]
    i = 0
    while i + 1 < len(groups):  # ranks next to one another, as one
        joined = (groups[i][0] + groups[i + 1][0], groups[i + 1][1])
        plan = _cheapest(*joined, width)
        if plan[0] < plans[i][0] + plans[i + 1][0]:
            groups[i : i + 2], plans[i : i + 2] = [joined], [plan]
            i = max(i - 1, 0)
        else:
            i += 1
    return [block for _, blocks in plans for block in blocks]


def _cheapest(members: list[Piece], rank: int, width: int) -> tuple[float, list[Layout]]:
    """(cost, blocks): an adapter axis for each number of rows that adapters have, or one axis of rows."""
    by_count: dict[int, list[Piece]] = {}
    for p in sorted(members, key=lambda p: p.rows or ()):
        by_count.setdefault(len(p.rows or ()), []).append(p)
    axes: list[Layout] = [(same, rank, False) for same in by_count.values()]
    options = [axes, [(members, rank, True)]]
    return min(((sum(_cost(b, width) for b in o), o) for o in options), key=lambda found: found[0])


def _cost(block: Layout, width: int) -> float:
    members, rank, by_row = block
    copies = len(_order(block)) if by_row else len(members)
    return 2 * CALL + copies * rank * width * 4 / BYTES


def _order(block: Layout) -> list[int]:
    """Rows of a block: adapter by adapter, or as they stand in the batch."""
    members, _, by_row = block
    rows = [row for p in members for row in p.rows or ()]
    return sorted(rows) if by_row else rows


def _slice(order: list[int], single: bool) -> slice | None:
    """The rows as a slice: neighbours, or (where each has an adapter of its own) rows at equal distances."""
    step = order[1] - order[0] if len(order) > 1 else 1
    if (step == 1 or (step > 1 and single)) and order == list(range(order[0], order[-1] + 1, step)):
        return slice(order[0], order[-1] + 1, step)
    return None


# -- their tensors --------------------------------------------------------------------------------------------------


def _single(p: Piece) -> Block:
    """One adapter for a whole batch, its tensors read where they lie."""
    down, up = p.low.pair(p.slot)
    wide = p.rank in WIDE
    return Block(0, down.mT if wide else down, up.mT, wide)


def _block(layout: Layout) -> Block:
    members, rank, by_row = layout
    wide = rank in WIDE
    banks: dict[int, list[Piece]] = {}
    for p in members:
        banks.setdefault(id(p.low), []).append(p)
    made = [
        _padded(*same[0].low.factors([p.slot for p in same], wide), rank, wide) for same in banks.values()
    ]
    down, up = made[0] if len(made) == 1 else [torch.cat(each) for each in zip(*made)]
    place = {id(p): i for i, p in enumerate(p for same in banks.values() for p in same)}
    taken = [(row, place[id(p)]) for p in members for row in (p.rows or ())[: None if by_row else 1]]
    chosen = [i for _, i in (sorted(taken) if by_row else taken)]
    if chosen != list(range(len(place))):
        index = torch.tensor(chosen, device=down.device)
        down, up = down.index_select(0, index), up.index_select(0, index)
    return Block(len(chosen), down, up, wide)


def _padded(down: Tensor, up: Tensor, rank: int, wide: bool) -> tuple[Tensor, Tensor]:
    """Factors of this rank, with zeros, which add nothing, exactly."""
    short = rank - up.shape[1]
    if short:
        down = torch.nn.functional.pad(down, (0, short) if wide else (0, 0, 0, short))
        up = torch.nn.functional.pad(up, (0, 0, 0, short))
    return down, up


__all__ = ["Adds", "Piece"]
