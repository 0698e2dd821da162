"""Rows: which rows of a batch an edit touches, and how to take them out and put them back.

Rows are never reordered. A run of neighbours is a slice; anything else is an index. Modules that see the batch
flattened to (rows * tokens, width), as experts do, get the same rows spread over their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.errors import Unsupported


class Rows:
    """A subset of the rows 0..total-1, in increasing order of position."""

    __slots__ = ("_index", "indices", "total")

    def __init__(self, indices: Sequence[int], total: int) -> None:
        self.indices, self.total = tuple(indices), total
        self._index: dict[Any, Tensor] = {}

    @property
    def whole(self) -> bool:
        return len(self.indices) == self.total and self.indices == tuple(range(self.total))

    def selector(self, length: int, device: torch.device) -> slice | Tensor:
        """What indexes an axis of `length` entries: a slice where the rows are neighbours."""
        key = (length, device)
        found = self._index.get(key)
        if found is not None:
            return found
        each = length // self.total if self.total else 1
        if length != each * self.total or each == 0:
            raise Unsupported(
                f"an adapter of some rows edits a module that sees {length} entries for a batch of {self.total} rows, "
                "so it has no rows to tell apart (a table of relative positions, a shared state).",
                next_step="leave that site out with exclude=, or use this adapter for whole batches",
            )
        first, last = (self.indices[0], self.indices[-1]) if self.indices else (0, -1)
        if last - first + 1 == len(self.indices) and list(self.indices) == list(range(first, last + 1)):
            chosen: Any = slice(first * each, (last + 1) * each)
        else:
            index = torch.tensor(self.indices, dtype=torch.long, device=device)
            if each > 1:
                index = (index[:, None] * each + torch.arange(each, device=device)).flatten()
            chosen = index
        self._index[key] = chosen
        return chosen

    def take(self, x: Tensor, axis: int = 0) -> Tensor:
        chosen = self.selector(x.shape[axis], x.device)
        if isinstance(chosen, slice):
            return x[chosen] if axis == 0 else x.narrow(axis, chosen.start, chosen.stop - chosen.start)
        return x.index_select(axis, chosen)

    def put(self, y: Tensor, new: Tensor, axis: int = 0) -> Tensor:
        """y with these rows replaced by `new`; `y` itself is left alone."""
        chosen = self.selector(y.shape[axis], y.device)
        if isinstance(chosen, slice):
            if len(self.indices) == self.total:
                return new
            parts = [
                y.narrow(axis, 0, chosen.start),
                new.to(y.dtype),
                y.narrow(axis, chosen.stop, y.shape[axis] - chosen.stop),
            ]
            return torch.cat(parts, axis)
        return y.index_copy(axis, chosen, new.to(y.dtype))

    def add(self, y: Tensor, dy: Tensor, axis: int = 0) -> Tensor:
        """y with `dy` added to these rows: in place where no gradient can see it."""
        chosen = self.selector(y.shape[axis], y.device)
        if not torch.is_grad_enabled() and not y.requires_grad and axis == 0:
            if isinstance(chosen, slice):
                y[chosen] += dy.to(y.dtype)
            else:
                y.index_add_(0, chosen, dy.to(y.dtype))
            return y
        if isinstance(chosen, slice):
            chosen = torch.arange(chosen.start, chosen.stop, device=y.device)
        return y.index_add(axis, chosen, dy.to(y.dtype))
