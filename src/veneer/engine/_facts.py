"""The facts of an op's rows, and calling a method's function with them."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from veneer.edits import At, Tensors, call

from ._draws import Dropper
from ._flat import by_token
from ._forms import over_rows
from ._frame import Frame
from ._program import Op
from ._residual import norm, residual, wants_residual
from ._rows import Rows


def facts(op: Op, frame: Frame) -> At:
    """The facts of this op's rows at its site."""
    at = frame.at.get(op.site.stack) or frame.at.get("") or _NO_FACTS
    if op.rows is not None:
        key = ("rows", op.site.stack, op.rows.indices)
        cached = frame.captured.get(key)
        if cached is None:
            cached = select(at, op.rows)
            frame.captured[key] = cached
        at = cached  # type: ignore[assignment]
    if frame.layout is not None:
        at = by_token(at)
    changes: dict[str, Any] = {"site": op.site}
    found = frame.session.conditions.get(op.adapter.name) if frame.session else None
    if found:
        changes["conditions"] = _spread(found, op, frame)
    if "total" in frame.captured:
        changes["_history"] = functools.partial(_history, frame, op)
    if frame.seeds is not None and at.training:
        changes["_dropout"] = Dropper(frame, op)
    if op.members:
        changes["members"] = tuple(functools.partial(_member, frame, op, m) for m in op.members)
    return at.with_(**changes)


_NO_FACTS = At()


def _spread(conditions: dict[str, Tensor], op: Op, frame: Frame) -> dict[str, Tensor]:
    """Conditions made for one row, for all of its beams."""
    total: Any = frame.captured.get("total", 0)

    def own(v: Tensor) -> Tensor:
        v = v.repeat_interleave(total // v.shape[0], 0) if v.shape[0] and total > v.shape[0] else v
        return v if op.rows is None else op.rows.take(v)

    return {k: own(v) for k, v in conditions.items()}


def select(at: At, rows: Rows) -> At:
    """The facts of some rows only."""
    changed = {}
    for name in ("mask", "mask_all", "prompt", "added", "tasks", "ids", "memory", "memory_mask"):
        value = getattr(at, name)
        if isinstance(value, Tensor) and value.shape[0] == rows.total:
            changed[name] = rows.take(value)
    return at.with_(**changed)


def _member(frame: Frame, op: Op, member: Op, x: Tensor, y: Tensor) -> Tensor:
    """The edit of a member at the op's site, for the op's rows: x and y are those already."""
    have: dict[str, Any] = {"x": x, "y": y, "at": facts(member, frame)}
    if wants_residual(member.method):
        whole = residual(member, frame, x)
        have["residual"] = whole if whole is x or whole is None or op.rows is None else op.rows.take(whole)
        have["at"] = have["at"].with_(_norm=norm(member, frame))
    return apply(member, frame, "output", have)


def _history(frame: Frame, op: Op, key: str, x: Tensor) -> Tensor:
    return frame.host.remember(frame, op, key, x)


def tensors_at(op: Op, frame: Frame, at: At | None) -> Tensors:
    """t, with what `derive` makes from facts of the rows."""
    wanted = op.method.arguments.get("derive", ())
    if "at" not in wanted:
        return op.t
    W = frame.host.weight(op.site) if "W" in wanted else None
    return op.t.with_(**call(op.method, "derive", op.t, {"W": W, "at": at or facts(op, frame)}))


def apply(op: Op, frame: Frame, function: str, have: dict[str, Any]) -> Tensor:
    if op.mapped:
        return over_rows(op.method, function, op.t, op.mapped, have)
    return call(op.method, function, tensors_at(op, frame, have.get("at")), have)
