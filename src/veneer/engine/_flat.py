"""Flat tokens: inside of a backbone a padded batch is one row of its real tokens, and no padding is computed.

Whatever treats each token by itself (linears, norms, activations, most edits) needs no more than that. What mixes
tokens is told where sequences begin: attention runs a sequence at a time, positions are given, a pooler and what
stands behind the backbone see padded rows again. An edit that reads facts of its rows gets padded rows too, and its
result is laid flat: this shows when it first asks for such a fact, and is not declared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.edits import At

from ._frame import Frame

OF_ROWS = frozenset(
    {"mask", "mask_all", "prompt", "added", "tasks", "ids", "memory", "memory_mask", "hidden", "conditions", "inputs",
     "_history"}
)  # fmt: skip


class Layout:
    """Where the real tokens of a padded batch stand in one row, shorter sequences first. mask: (rows, tokens) bool."""

    def __init__(self, mask: Tensor) -> None:
        self.rows, self.tokens = mask.shape
        self.mask = mask
        lengths = mask.sum(1)
        order = lengths.argsort(stable=True)
        places = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
        self.index = places[order][mask[order]]  # (total,): of each flat token, its place among rows * tokens
        self.total = int(self.index.shape[0])
        counted = torch.unique_consecutive(lengths[order], return_counts=True)
        self.groups = tuple(zip(counted[1].tolist(), counted[0].tolist()))  # (sequences, tokens of each)
        self.sizes = [count * length for count, length in self.groups]
        self.order = order

    def holds(self, x: Any) -> bool:
        """Whether x is of the flat stream: (1, total, ...)."""
        return isinstance(x, Tensor) and x.dim() >= 2 and x.shape[0] == 1 and x.shape[1] == self.total

    def flat(self, x: Tensor) -> Tensor:
        """(rows, tokens, ...) -> (1, total, ...)"""
        return x.flatten(0, 1).index_select(0, self.index)[None]

    def pad(self, x: Tensor) -> Tensor:
        """(1, total, ...) -> (rows, tokens, ...), zeros at padding"""
        wide = x.new_zeros(self.rows * self.tokens, *x.shape[2:])
        return wide.index_copy(0, self.index, x[0]).unflatten(0, (self.rows, self.tokens))

    def padded(self, x: Any) -> Any:
        """What holds the flat stream, anywhere in x, in rows; the rest as it is."""
        if isinstance(x, Tensor):
            return self.pad(x) if self.holds(x) else x
        if hasattr(x, "items"):
            for key, value in x.items():
                x[key] = self.padded(value)
            return x
        if isinstance(x, (tuple, list)):
            made = [self.padded(v) for v in x]
            return type(x)(*made) if hasattr(x, "_fields") else type(x)(made)
        return x


# -- attention --------------------------------------------------------------------------------------------------------


def by_sequence(
    base: Callable[..., Any], layout: Layout, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:  # fmt: skip
    """The base's attention, sequences of one length at a time. q, k, v: (1, heads, total, d) -> (1, total, heads, d).

    mask: the base's own of the one row, of which each sequence gets its block; None leaves causality to the base.
    """
    outs, start = [], 0
    for group, *parts in zip(layout.groups, *(x.split(layout.sizes, 2) for x in (q, k, v))):
        count, length = group
        own = [x if count == 1 else x[0].unflatten(1, (count, length)).transpose(0, 1) for x in parts]
        seen = None if mask is None else mask[..., start : start + length, start : start + length]
        out, _ = base(module, *own, seen, **kwargs)
        outs.append(out.reshape(1, count * length, *out.shape[2:]))
        start += count * length
    return torch.cat(outs, 1), None


def in_rows(layout: Layout, x: Tensor) -> Tensor:
    """q, k or v: (1, heads, total, d) -> (rows, heads, tokens, d)"""
    return layout.pad(x.transpose(1, 2)).transpose(1, 2)


def mask_in_rows(layout: Layout, mask: Tensor) -> Tensor:
    """(1, 1 or heads, total, total) -> (rows, 1 or heads, tokens, tokens): each row's block; padding sees itself."""
    closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    wide = mask.new_full((layout.rows, mask.shape[1], layout.tokens, layout.tokens), closed)
    start = 0
    for row in layout.order.tolist():
        places = layout.mask[row].nonzero()[:, 0]
        end = start + len(places)
        wide[row, :, places[:, None], places] = mask[0, :, start:end, start:end]
        start = end
    row, place = (~layout.mask).nonzero(as_tuple=True)
    wide[row, :, place, place] = True if mask.dtype == torch.bool else 0.0  # no softmax over nothing
    return wide


# -- edits ------------------------------------------------------------------------------------------------------------


class NeedsRows(Exception):
    """An edit asked for a fact of its rows where tokens are flat. Never leaves the engine."""


class ByToken(At):
    """Facts of a flat stream: none of them is of a row."""

    def __getattribute__(self, name: str) -> Any:
        if name in OF_ROWS:
            raise NeedsRows(name)
        return object.__getattribute__(self, name)


def by_token(at: At) -> At:
    made = object.__new__(ByToken)
    made.__dict__.update(at.__dict__)
    return made


def laid_out(op: Any, frame: Frame, function: str, run: Callable[..., Tensor], *given: Any) -> Tensor:
    """run(frame, *given) of an edit: on flat tokens where it takes each for itself, else in rows and laid flat.

    Which of the two is seen once for an edit and a site, without gradients, so that a block that is run again for its
    backward does what it did before.
    """
    layout = frame.layout
    if layout is None or not any(layout.holds(x) for x in given):
        return run(frame, *given)
    known = op.adapter.__dict__.setdefault("_reads_rows", {})
    key = (op.site.name, op.port, op.plan.part, function, op.adapter.training)
    if key not in known:
        try:
            with torch.no_grad(), torch.random.fork_rng():  # looking draws nothing from what comes after
                run(frame, *given)
            known[key] = False
        except NeedsRows:
            known[key] = True
    if not known[key]:
        return run(frame, *given)
    return layout.flat(run(replace(frame, layout=None), *(layout.padded(x) for x in given)))


__all__ = [
    "ByToken",
    "Layout",
    "NeedsRows",
    "by_sequence",
    "by_token",
    "in_rows",
    "laid_out",
    "mask_in_rows",
]
