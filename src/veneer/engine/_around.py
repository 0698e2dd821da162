"""Edits around a block, and those that write the last hidden state."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ._facts import apply, facts
from ._flat import laid_out
from ._frame import Frame
from ._outputs import first, first_input, with_first
from ._program import Op


def around(ops: list[Op], frame: Frame, plain: Any, args: tuple, kwargs: dict) -> Any:
    """Edits around a block. The block runs for all rows, then each op's rows are chosen: a cache stays whole."""
    args, kwargs, x = first_input(args, kwargs)
    result: Any = None

    def base(z: Tensor) -> Tensor:
        nonlocal result
        result = plain(z, *args[1:], **kwargs)
        return first(result)

    call_inner = base
    for op in ops:
        call_inner = functools.partial(_around_one, op, frame, call_inner)
    y = call_inner(x)
    if result is None:  # an edit that never called the block: its cache and extras are those of a plain call
        result = plain(x, *args[1:], **kwargs)
    return with_first(result, y)


def _around_one(op: Op, frame: Frame, inner: Any, x: Tensor) -> Tensor:
    layout = frame.layout

    def in_rows(z: Tensor) -> Tensor:
        return layout.pad(inner(layout.flat(z)))

    def run(f: Frame, mine: Tensor) -> Tensor:
        return _around_rows(op, f, inner if f.layout is layout else in_rows, mine)

    return laid_out(op, frame, "around", run, x)


def _around_rows(op: Op, frame: Frame, inner: Any, x: Tensor) -> Tensor:
    rows, live = op.rows, op.live
    whole: Tensor | None = None

    def run_once(z: Tensor) -> Tensor:
        """The block for all rows, the others as they were: a cache takes each call, so there is one."""
        nonlocal whole
        if live is not None:
            z = torch.where(live.view(-1, *[1] * (z.dim() - 1)), z, x)
        whole = inner(z if rows is None else rows.put(x, z))
        return whole if rows is None else rows.take(whole)

    mine = x if rows is None else rows.take(x)
    new = apply(op, frame, "around", {"call": run_once, "x": mine, "at": facts(op, frame)})
    if whole is None:
        whole = inner(x)
    if live is not None:
        return torch.where(live.view(-1, *[1] * (new.dim() - 1)), new, whole)
    return new if rows is None else rows.put(whole, new)


def leave(op: Op, frame: Frame, h: Tensor) -> Tensor:
    """The last hidden state written by an exit edit, which reads the taps of its own rows."""
    return laid_out(op, frame, "exit", lambda f, mine: _leave(op, f, mine, frame.layout), h)


def _leave(op: Op, frame: Frame, h: Tensor, layout: Any) -> Tensor:
    taps = (frame.taps or {}).get(op.site.stack, {})
    if frame.layout is not layout:
        taps = {block: layout.padded(tap) for block, tap in taps.items()}
    if op.rows is None:
        new = apply(op, frame, "exit", {"taps": taps, "h": h, "at": facts(op, frame)}).to(h.dtype)
        return new if op.live is None else torch.where(op.live.view(-1, *[1] * (h.dim() - 1)), new, h)
    rows = op.rows
    mine = {block: rows.take(tap) for block, tap in taps.items()}
    new = apply(op, frame, "exit", {"taps": mine, "h": rows.take(h), "at": facts(op, frame)})
    return rows.put(h, new)
