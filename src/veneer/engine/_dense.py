"""Weight edits: dense ones through W', factored ones added to the output.

All are functions of the *bare* W and add up, so merging one of two adapters leaves the other what it was.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from veneer.edits import Tensors, delta_of
from veneer.errors import ShapeDiffers, Unsupported

from ._facts import apply, facts, select, tensors_at
from ._flat import laid_out
from ._frame import Frame, entered
from ._fused import beside
from ._kept import may_keep, sources_of
from ._outputs import cut_features, first, with_first
from ._plan import SitePlan
from ._program import Op, by_rows, is_shift, narrow
from ._rows import Rows
from ._swap import NAME, plain_class, twin
from ._weights import cut, features, paste, stored


def weighted(module: nn.Module, plain: Any, ops: list[Op], frame: Frame, args: tuple, kwargs: dict) -> Any:
    """The base's output under weight edits: dense ones through W', factored ones added to the output."""
    if all(op.adds_alone for op in ops):  # the common case, at every linear of every decoding step
        x = args[0] if args else next(iter(kwargs.values()))
        made = beside(module, ops, frame, x)
        if made is not None:
            return made
        y = plain(*args, **kwargs)
        return with_added(module, ops, frame, x, y)
    factored = [op for op in ops if _is_factored(op, frame)]
    dense = [op for op in ops if not _is_factored(op, frame)]
    if dense and factored:
        factored, dense = _apart_from_dense(factored, dense, frame)
    chosen_later = [op for op in dense if op.live is not None]
    whole = [op for op in dense if op.rows is None and op.live is None]
    parts = [op for op in dense if op.rows is not None]
    apart = any("y" in op.method.arguments.get("branch", ()) for op in factored)
    bias = getattr(module, "bias", None) if apart else None
    replaced = _replaced(module, whole, frame)
    if bias is not None and "bias" not in replaced:
        replaced["bias"] = torch.zeros_like(bias)  # not every class can do without one
    else:
        bias = None
    segments = _segments(parts)
    if segments:
        args, kwargs = _spread_rows(segments[0][0].total, args, kwargs)
    y = twin(module, replaced).forward(*args, **kwargs) if replaced else plain(*args, **kwargs)
    # A table of positions that counts for the whole batch gives one row to all: each adapter's rows get its own.
    rowless = bool(segments) and parts[0].site.kind == "embedding" and _is_rowless(first(y), args, kwargs)
    y = with_first(y, first(y)[None]) if rowless else y
    shared = bool(segments) and first(y).shape[0] == 1 < segments[0][0].total
    if shared:
        y = with_first(y, first(y).expand(segments[0][0].total, *first(y).shape[1:]))
    for rows, members in segments:
        chosen = list(args) if shared else [_take(rows, v) for v in args]
        named = kwargs if shared else {k: _take(rows, v) for k, v in kwargs.items()}
        swapped = _replaced(module, [*whole, *members], frame)
        if bias is not None:  # it is added at the end: here what these edits add to it
            now = swapped.get("bias")
            swapped["bias"] = torch.zeros_like(bias) if now is None else now - bias
        stand_in = twin(module, swapped)
        if module._modules:  # its children see these rows only
            with entered(_narrowed(frame, rows, module.__dict__[NAME])):
                part = stand_in.forward(*chosen, **named)
        else:
            part = stand_in.forward(*chosen, **named)
        part = with_first(part, first(part)[None]) if rowless else part
        if shared:
            part = with_first(part, first(part).expand(len(rows.indices), *first(part).shape[1:]))
        y = _put(rows, y, part)
    for op in chosen_later:  # banked form: every row runs, `live` chooses
        swapped = _replaced(module, [op], frame)
        new = first(twin(module, swapped).forward(*args, **kwargs))
        now = first(y)
        if op.site.kind in ("linear", "conv1d", "conv", "embedding"):  # linear in W: what it adds, added
            new = now + new - first(plain(*args, **kwargs))
        assert op.live is not None
        y = with_first(y, torch.where(op.live.view(-1, *[1] * (now.dim() - 1)), new, now))
    if factored:
        x = args[0] if args else next(iter(kwargs.values()))
        y = with_first(y, _add_branches(module, factored, frame, x, first(y), bias))
    return y


def may_add(frame: Frame, args: tuple) -> bool:
    """Whether edits of a settled program may be added in place: no gradient, no transform and no flat tokens here."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return frame.layout is None and len(args) == 1 and _LEVEL() is None


def with_added(module: nn.Module, ops: list[Op], frame: Frame, x: Tensor, y: Any) -> Any:
    """The module's output y with what its edits add, op by op."""
    return with_first(y, _add_branches(module, ops, frame, x, first(y), None))


def weighted_flat(
    module: nn.Module, plain: Any, ops: list[Op], frame: Frame, args: tuple, kwargs: dict
) -> Any:
    """The same on flat tokens; in rows where one of the edits asks for facts of its rows."""
    name = None if args else next(iter(kwargs))
    x = args[0] if args else kwargs[name]

    def run(f: Frame, mine: Tensor) -> Any:
        given = (mine, *args[1:]) if args else ()
        return weighted(module, plain, ops, f, given, kwargs if args else {**kwargs, name: mine})

    return laid_out(ops[0], frame, "weight", run, x)


def _apart_from_dense(factored: list[Op], dense: list[Op], frame: Frame) -> tuple[list[Op], list[Op]]:
    """Where a dense edit changes a row's output, no other edit of that row can read it bare: it goes by `delta`."""
    total = frame.captured.get("total", 0)
    covered: set[int] = set()
    for op in dense:
        covered.update(range(total) if op.rows is None else op.rows.indices)
    stay: list[Op] = []
    more: list[Op] = []
    for op in factored:
        mine = tuple(range(total)) if op.rows is None else op.rows.indices
        if (
            "y" not in op.method.arguments.get("branch", ())
            or op.live is not None
            or covered.isdisjoint(mine)
        ):
            stay.append(op)
        elif not op.rowed:
            more.append(op)
        else:
            inside = [o for o in op.one_by_one(total) if o.rows is not None and o.rows.indices[0] in covered]
            more += inside
            rest = [(row, j) for j, row in enumerate(mine) if row not in covered]
            if rest:
                stay.append(op.for_rows(Rows([row for row, _ in rest], total), rest))
    return stay, [*dense, *more]


def _narrowed(frame: Frame, rows: Rows, module: str) -> Frame:
    """The frame of some rows of the call: their names, their facts."""
    names = [frame.names[i] for i in rows.indices]
    program = narrow(frame.program, rows, module)
    at = {stack: select(facts, rows) for stack, facts in frame.at.items()}
    return dataclasses.replace(frame, program=program, at=at, names=names, captured={"total": len(names)})


def _spread_rows(total: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Inputs that all rows share (positions: one row for the batch) -> one for each row."""

    def spread(v: Any) -> Any:
        if isinstance(v, Tensor) and v.dim() > 1 and v.shape[0] == 1 and total > 1:
            return v.expand(total, *v.shape[1:])
        return v

    return tuple(spread(v) for v in args), {k: spread(v) for k, v in kwargs.items()}


def _is_rowless(y: Tensor, args: tuple, kwargs: dict) -> bool:
    """Whether a table was asked for positions alone: (tokens, width), and no input has an axis of rows."""
    return y.dim() == 2 and all(not isinstance(v, Tensor) or v.dim() < 2 for v in (*args, *kwargs.values()))


def _is_factored(op: Op, frame: Frame) -> bool:
    """Whether the edit adds its own change to the output. One that reads the bare output cannot while another
    adapter is merged into the weight: there is no bare output then, and it goes by `delta` on the kept weight."""
    if is_shift(op.plan):
        return True
    reads_output = "y" in op.method.arguments.get("branch", ())
    if reads_output and (op.site.module, op.site.parameter) in frame.host.kept:
        return False
    return op.site.kind in ("linear", "conv1d") and "branch" in op.method.arguments and not op.site.experts


def _replaced(module: nn.Module, ops: list[Op], frame: Frame) -> dict[str, Tensor | None]:
    """Parameter name -> W' for the given dense edits, all of the bare W, added."""
    host = frame.host
    replaced: dict[str, Tensor | None] = {}
    name = module.__dict__[NAME]
    for op in ops:
        site = op.site
        now = replaced.get(site.parameter)
        kept = host.kept.get((name, site.parameter))
        alone = kept is None and sum(o.site.parameter == site.parameter for o in ops) == 1
        if alone:
            replaced[site.parameter] = _made(
                op, frame, "W'", functools.partial(_new_weight, module, op, frame)
            )
            continue
        start = now if now is not None else stored(module, site.parameter)
        dW = _made(op, frame, "dW", functools.partial(_change, module, op, frame))
        replaced[site.parameter] = paste(start, cut(start, site) + dW.to(start.dtype), site)
    for op in ops:
        _shift_bias(module, op, replaced)
    return replaced


def _shift_bias(module: nn.Module, op: Op, replaced: dict[str, Tensor | None]) -> None:
    """Put what an edit of the weight adds to the bias beside its W'. A layer without a bias gets one."""
    change = op.method.bias_delta(op.t) if hasattr(op.method, "bias_delta") else None
    if change is None:
        return
    site = op.site
    name = site.bias or "bias"
    now = replaced[name] if name in replaced else getattr(module, name, None)
    if site.ranges:
        wide = len(now) if now is not None else max(j for _, j in site.ranges)
        change = change.new_zeros(wide).index_copy(0, features(site, change.device), change)
    replaced[name] = change if now is None else now + change.to(now.dtype)


def _made(op: Op, frame: Frame, what: str, make: Any) -> Tensor:
    """What `make` makes of the op's tensors and the bare weight: kept while neither changes."""
    if not may_keep(op):
        return make()
    host, site = frame.host, op.site
    bare = host.kept.get((site.module, site.parameter))
    sources = [*sources_of(host.module(site.module), site.parameter)] if bare is None else [bare]
    sources += [v for _, v in op.t.items() if isinstance(v, Tensor)]
    key = (op.adapter.name, id(op.plan), what)
    found = host.dense.get(key, op.t, sources)
    if found is None:
        found = make()
        host.dense.put(key, op.t, sources, found, set(frame.adapters))
    return found


def _change(module: nn.Module, op: Op, frame: Frame) -> Tensor:
    W = cut(frame.host.bare(op.site), op.site)
    _check_shape(op, W)
    return dense_delta(op.plan, tensors_at(op, frame, None), W)


def _new_weight(module: nn.Module, op: Op, frame: Frame) -> Tensor:
    """The stored parameter under one edit alone."""
    site, t = op.site, tensors_at(op, frame, None)
    bare = stored(module, site.parameter)
    W = cut(bare, site)
    _check_shape(op, W)
    if "weight" in op.method.arguments and not site.experts:
        return paste(bare, op.method.weight(t, W), site)  # type: ignore[attr-defined]
    return paste(bare, W + dense_delta(op.plan, t, W).to(bare.dtype), site)


def _check_shape(op: Op, W: Tensor) -> None:
    """The base may have been resized since the adapter came."""
    site = op.site
    shape = (site.experts, *site.shape) if site.experts else site.shape
    if shape and tuple(W.shape) != tuple(shape):
        raise ShapeDiffers(
            f"'{site.name}' was {tuple(shape)} when '{op.adapter.name}' was attached, and is {tuple(W.shape)} now.",
            next_step="resize the base first, then attach or load the adapter",
        )


def dense_delta(sp: SitePlan, t: Tensors, W: Tensor) -> Tensor:
    """dW in the method's shape; over experts by vmap, shared tensors unmapped."""
    if not sp.site.experts:
        return delta_of(sp.method, t, W)
    shared = {n: v for n, v in t.items() if n in sp.specs and sp.specs[n].scope != "site"}
    mapped = {n: v for n, v in t.items() if n not in shared}

    def one(own: dict[str, Tensor], w: Tensor) -> Tensor:
        return delta_of(sp.method, Tensors({**shared, **own}), w)

    return torch.vmap(one)(mapped, W)


def _segments(ops: list[Op]) -> list[tuple[Rows, list[Op]]]:
    """Rows with the same dense edits, each group once."""
    for op in ops:
        _check_rows(op)
    return by_rows(ops, ops[0].rows.total) if ops else []  # type: ignore[union-attr]


def _check_rows(op: Op) -> None:
    """A table of relative positions sees (tokens, tokens): it has no rows to tell apart."""
    if op.site.kind == "embedding" and op.adapter.plan.anatomy.facts.positions == "relative":
        tables = {m for _, m in op.adapter.plan.anatomy.facts.token_embeddings}
        if op.site.module not in tables:
            raise Unsupported(
                f"'{op.site.module}' is a table of relative positions that all rows of a batch share, so "
                f"'{op.adapter.name}' cannot edit it for some rows only.",
                next_step=f"exclude={op.site.module!r}, or use this adapter for whole batches",
            )


def _take(rows: Rows, value: Any) -> Any:
    # One axis alone is no batch: positions that all rows share.
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] % rows.total == 0 and value.shape[0]:
        return rows.take(value)
    return value


def _put(rows: Rows, y: Any, new: Any) -> Any:
    if isinstance(y, Tensor):
        return rows.put(*_lone(rows, y, new))
    if isinstance(y, tuple):
        return tuple(_put_one(rows, a, b) for a, b in zip(y, new))
    return with_first(y, rows.put(first(y), first(new)))


def _lone(rows: Rows, y: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs that all rows share (learned positions) -> one for each row."""
    if y.dim() > 1 and y.shape[0] == 1 and new.shape[0] == 1 and rows.total > 1:
        return y.expand(rows.total, *y.shape[1:]), new.expand(len(rows.indices), *new.shape[1:])
    return y, new


def _put_one(rows: Rows, a: Any, b: Any) -> Any:
    if not isinstance(a, Tensor):
        return tuple(_put_one(rows, p, q) for p, q in zip(a, b)) if isinstance(a, tuple) else a
    axis = (
        0 if a.shape[0] % rows.total == 0 and b.shape[0] != a.shape[0] else 1
    )  # recurrent states: batch on axis 1
    return rows.put(a, b, axis)


def _add_branches(
    module: nn.Module, ops: list[Op], frame: Frame, x: Tensor, y: Tensor, bias: Tensor | None
) -> Tensor:
    """y with what factored edits add to the module's output."""
    reads = any("y" in op.method.arguments.get("branch", ()) for op in ops)
    # Without gradients dy is added in place; an edit that reads the bare output then needs a copy of it.
    bare = y.clone() if reads and not torch.is_grad_enabled() else y
    in_place = _may_write(module) and not (reads and torch.is_grad_enabled())
    for op in ops:
        m, site = op.method, op.site
        rows = op.rows
        mine = rows.take(x) if rows is not None else x
        if is_shift(op.plan):
            W = cut(frame.host.bare(site), site)
            dy = delta_of(m, tensors_at(op, frame, None), W)
            dy = _shift_like(rows.take(y) if rows is not None else y, dy, op, frame)
        else:
            have: dict[str, Any] = {"x": _as_rows(mine, op)}
            if "y" in m.arguments["branch"]:
                inner = cut_features(rows.take(bare) if rows is not None else bare, site)
                have["y"] = _as_rows(inner, op)
            if "at" in m.arguments["branch"] and op.low is None:
                have["at"] = facts(op, frame)
            dy = op.low(have["x"]) if op.low is not None else apply(op, frame, "branch", have)
            dy = dy.reshape(*mine.shape[:-1], dy.shape[-1]) if op.by_row else dy
        if op.live is not None:
            dy = torch.where(
                op.live.view(-1, *[1] * (dy.dim() - 1)), dy, torch.zeros((), dtype=dy.dtype, device=dy.device)
            )
        dy = dy.to(y.dtype)
        if site.ranges and not is_shift(op.plan):
            wide = torch.zeros(*dy.shape[:-1], y.shape[-1], dtype=dy.dtype, device=dy.device)
            dy = wide.index_copy(-1, features(site, dy.device), dy)
        if rows is not None:
            y = rows.add(y, dy)
        elif in_place:
            y = y.add_(dy)
        else:
            y = y + dy
    return y if bias is None else y + bias


def _may_write(module: nn.Module) -> bool:
    """Whether the module's output is nobody else's: a linear layer's is new at each call, and no backward reads it.
    Compiled code needs no such help, and under `vmap` the change may have an axis that the output lacks."""
    return new_output(plain_class(module)) and not torch.compiler.is_compiling() and _LEVEL() is None


def new_output(made: type) -> bool:
    """Whether modules of this class give a new tensor at each call, which nobody else reads."""
    return getattr(made, "forward", None) is nn.Linear.forward or getattr(made, "forms_its_product", False)


# Under `vmap` and the like it gives a number; 0 where torch does not tell.
_LEVEL: Any = getattr(torch._C._functorch, "maybe_current_level", lambda: 0)

_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


def _shift_like(y: Tensor, dy: Tensor, op: Op, frame: Frame) -> Tensor:
    """A change of a bias, (features,) or (rows, 1, features), in the shape of the output that it shifts."""
    width = dy.shape[-1]
    first_axis = y.dim() > 2 and y.shape[1] == width
    if first_axis and y.shape[-1] == width:  # either axis could be the features: the module's kind decides
        first_axis = isinstance(frame.host.module(op.site.module), _CHANNELS_FIRST)
    features_at = 1 if first_axis else y.dim() - 1
    if op.rowed:
        dy = dy.reshape(op.count, *[1] * (y.dim() - 2), -1)
        dy = dy.movedim(-1, features_at)
        return dy.repeat_interleave(y.shape[0] // op.count, 0).expand_as(y)
    return dy.view(-1, *[1] * (y.dim() - 1 - features_at)).expand_as(y)


def _as_rows(value: Tensor, op: Op) -> Tensor:
    return value.reshape(op.count or value.shape[0], -1, value.shape[-1]) if op.by_row else value
