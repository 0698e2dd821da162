"""What runs at an edited module: input edits, the base, weight edits, output edits, in this order.

Weight edits are functions of the *bare* W and add up; outputs are edited after all weight edits. So merging one of
two adapters leaves the other what it was.
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
from ._frame import Frame, current, entered, local
from ._plan import SitePlan
from ._program import Op, SiteOps, is_shift
from ._rows import Rows
from ._swap import HOST, NAME, kind, kinds_of, twin
from ._tokens import forget_rows, insert
from ._weights import cut, features, paste, stored


def frame_of(module: nn.Module) -> Frame | None:
    """The frame for this module; one is made where nothing above it opened a door."""
    host = module.__dict__[HOST]
    frame = current(host)
    if frame is None and local.frame is None and host.active:
        return host.implicit_frame(module.training)
    return frame


@kind("site")
def _site(base: type) -> dict[str, Any]:
    plain = base.forward  # type: ignore[attr-defined]

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        frame = frame_of(self)
        if frame is None:
            return plain(self, *args, **kwargs)
        ops = frame.program.get(self.__dict__[NAME])
        if ops is None:
            return plain(self, *args, **kwargs)
        return run(self, functools.partial(plain, self), ops, frame, args, kwargs)

    return {"forward": forward}


def run(module: nn.Module, plain: Any, ops: SiteOps, frame: Frame, args: tuple, kwargs: dict) -> Any:
    """The module's forward under `ops`."""
    if ops.input or ops.capture or ops.output:
        args, kwargs, x = _first_input(args, kwargs)
    else:
        x = None
    if ops.capture:
        frame.captured[module.__dict__[NAME]] = x
    if ops.input:
        for op in ops.input:
            if not op.site.ranges:
                x = edit(op, frame, x, "input", {"x": x})
        args = (x, *args[1:])
    y = _inner(module, plain, ops, frame, args, kwargs)
    for ranges in dict.fromkeys(op.site.ranges for op in ops.input if op.site.ranges):
        # The input of one part of a fused projection: the others see the module's own.
        own = x
        for op in ops.input:
            if op.site.ranges == ranges:
                own, site = edit(op, frame, own, "input", {"x": own}), op.site
        part = first(_inner(module, plain, ops, frame, (own, *args[1:]), kwargs))
        y = with_first(y, _paste_features(first(y), cut_features(part, site), site))
    if ops.tokens and not frame.host.has_token_ids(ops.tokens[0].site.stack):
        y = with_first(y, _insert_after(ops.tokens, frame, first(y)))
    leaving = (
        [] if "block" in kinds_of(module) else ops.exit
    )  # a block leaves its own tap first, outside of `forward`
    for op in (*ops.output, *leaving):
        inner = first(y)
        if op.port == "exit":
            new = leave(op, frame, inner)
        else:
            source = op.site.source
            seen = frame.captured.get(source, x) if source and source != op.site.module else x
            mine = cut_features(inner, op.site)
            new = edit(op, frame, mine, "output", {"x": seen, "y": mine})
            new = new if not op.site.ranges else _paste_features(inner, new, op.site)
        y = with_first(y, new)
    return y


def _inner(module: nn.Module, plain: Any, ops: SiteOps, frame: Frame, args: tuple, kwargs: dict) -> Any:
    """The base under weight edits, or under edits around it."""
    if ops.around:
        return around(ops.around, frame, plain, args, kwargs)
    if ops.weight:
        return weighted(module, plain, ops.weight, frame, args, kwargs)
    return plain(*args, **kwargs)


def _paste_features(y: Tensor, part: Tensor, site: Any) -> Tensor:
    return y.index_copy(-1, features(site, y.device), part.to(y.dtype))


def _first_input(args: tuple, kwargs: dict) -> tuple[tuple, dict, Any]:
    if args:
        return args, kwargs, args[0]
    name = next(iter(kwargs))
    for likely in ("hidden_states", "input", "x", "input_ids"):
        if likely in kwargs:
            name = likely
    rest = {k: v for k, v in kwargs.items() if k != name}
    return (kwargs[name],), rest, kwargs[name]


def _insert_after(ops: list[Op], frame: Frame, y: Tensor) -> Tensor:
    """Positions put in behind an embedding without token ids; padding between rows is closed to attention."""
    y, where = insert(ops, frame, y, None)
    frame.inserted = where
    real = torch.ones(y.shape[0], y.shape[1] - where.length, dtype=torch.bool, device=y.device)
    if torch.compiler.is_compiling() or int(where.counts.min()) != where.length:
        frame.key_mask[ops[0].site.stack] = where.extend(real, fill=False, at_added=True)
    for stack in ("", ops[0].site.stack):
        if stack in frame.at:
            seen = where.extend(real, fill=False, at_added=True)
            frame.at[stack] = frame.at[stack].with_(
                added=where.added, prompt=where.extend(real, fill=False), mask=seen, mask_all=seen
            )
    forget_rows(frame)
    return y


def first(y: Any) -> Tensor:
    """The tensor that is edited: the first of a tuple, the last hidden state of a model output."""
    if isinstance(y, Tensor):
        return y
    if isinstance(y, (tuple, list)):
        return y[0]
    return y["last_hidden_state"] if "last_hidden_state" in y else y[0]


def with_first(y: Any, new: Tensor) -> Any:
    if isinstance(y, Tensor):
        return new
    if isinstance(y, tuple) and not hasattr(y, "keys"):
        if hasattr(y, "_replace"):
            named: Any = y
            return named._replace(**{named._fields[0]: new})
        return (new, *y[1:])
    if isinstance(y, list):
        return [new, *y[1:]]
    y["last_hidden_state" if "last_hidden_state" in y else next(iter(y.keys()))] = new
    return y


# -- activation edits -------------------------------------------------------------------------------------------


def edit(op: Op, frame: Frame, target: Tensor, function: str, have: dict[str, Any]) -> Tensor:
    """target with one input or output edit applied to the op's rows."""
    wants_at = "at" in op.method.arguments[function] or "at" in op.method.arguments.get("derive", ())
    if not target.is_floating_point():
        return target
    given = {}
    for name, value in have.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = op.rows.take(value) if op.rows is not None else value
            value = _last_axis(value, op)
        given[name] = value
    if wants_at:
        given["at"] = facts(op, frame)
    mine = given["y" if function == "output" else "x"]
    new = apply(op, frame, function, given)
    new = _back(new, mine, target if op.rows is None else op.rows.take(target), op).to(target.dtype)
    if op.live is not None:
        return torch.where(op.live.view(-1, *[1] * (target.dim() - 1)), new, target)
    return new if op.rows is None else op.rows.put(target, new)


def _last_axis(value: Tensor, op: Op) -> Tensor:
    """Channels last for convolutions; (rows, tokens, width) where tensors have a row axis."""
    if _channels_first(op, value):
        value = value.movedim(1, -1).flatten(1, 2)  # places of an image are its tokens
    if op.rowed:
        value = value.reshape(_rows_of(op, value), -1, value.shape[-1])
    return value


def _channels_first(op: Op, value: Tensor) -> bool:
    """Images as convolutions have them: (rows, channels, height, width). Edits see channels last."""
    if value.dim() != 4:
        return False
    width = op.site.width
    return op.site.kind == "conv" or (value.shape[-1] != width and value.shape[1] == width)


def _rows_of(op: Op, value: Tensor) -> int:
    """How many rows a rowed op sees: its tensors have one entry for each."""
    return op.count


def _back(new: Tensor, mine: Tensor, like: Tensor, op: Op) -> Tensor:
    if _channels_first(op, like):
        last = like.movedim(1, -1)
        return new.reshape(last.shape).movedim(-1, 1)
    return new.reshape(like.shape) if op.rowed else new


# -- weight edits -----------------------------------------------------------------------------------------------


def weighted(module: nn.Module, plain: Any, ops: list[Op], frame: Frame, args: tuple, kwargs: dict) -> Any:
    """The base's output under weight edits: dense ones through W', factored ones added to the output."""
    factored = [op for op in ops if _is_factored(op, frame)]
    dense = [op for op in ops if not _is_factored(op, frame)]
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
    for rows, members in segments:
        chosen = [_take(rows, v) for v in args]
        named = {k: _take(rows, v) for k, v in kwargs.items()}
        swapped = _replaced(module, [*whole, *members], frame)
        if bias is not None:
            swapped["bias"] = torch.zeros_like(bias)
        stand_in = twin(module, swapped)
        if module._modules:  # its children see these rows only
            with entered(_narrowed(frame, rows)):
                part = stand_in.forward(*chosen, **named)
        else:
            part = stand_in.forward(*chosen, **named)
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
        y = with_first(y, _add_branches(factored, frame, x, first(y), bias))
    return y


def _narrowed(frame: Frame, rows: Rows) -> Frame:
    """The frame of some rows of the call: their names, their facts."""
    names = [frame.names[i] for i in rows.indices]
    program = frame.host.program(names, any(at.training for at in frame.at.values()))
    at = {stack: select(facts, rows) for stack, facts in frame.at.items()}
    return dataclasses.replace(frame, program=program, at=at, names=names, captured={"total": len(names)})


def _spread_rows(total: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Inputs that all rows share (positions: one row for the batch) -> one for each row."""

    def spread(v: Any) -> Any:
        if isinstance(v, Tensor) and v.dim() > 1 and v.shape[0] == 1 and total > 1:
            return v.expand(total, *v.shape[1:])
        return v

    return tuple(spread(v) for v in args), {k: spread(v) for k, v in kwargs.items()}


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
        bare = kept if kept is not None else stored(module, site.parameter)
        alone = kept is None and sum(o.site.parameter == site.parameter for o in ops) == 1
        W = cut(bare, site)
        _check_shape(op, W)
        t = tensors_at(op, frame, None)
        if alone and "weight" in op.method.arguments and not site.experts:
            replaced[site.parameter] = paste(bare, op.method.weight(t, W), site)  # type: ignore[attr-defined]
            continue
        start = now if now is not None else stored(module, site.parameter)
        new = cut(start, site) + dense_delta(op.plan, t, W).to(start.dtype)
        replaced[site.parameter] = paste(start, new, site)
    return replaced


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
    by_row: dict[int, list[Op]] = {}
    total = 0
    for op in ops:
        _check_rows(op)
        total = op.rows.total  # type: ignore[union-attr]
        for i in op.rows.indices:  # type: ignore[union-attr]
            by_row.setdefault(i, []).append(op)
    groups: dict[tuple[int, ...], tuple[list[int], list[Op]]] = {}
    for i in sorted(by_row):
        key = tuple(id(op) for op in by_row[i])
        groups.setdefault(key, ([], by_row[i]))[0].append(i)
    return [(Rows(indices, total), members) for indices, members in groups.values()]


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
    if isinstance(value, Tensor) and value.dim() and value.shape[0] % rows.total == 0 and value.shape[0]:
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


def _add_branches(ops: list[Op], frame: Frame, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    # Without gradients dy is added in place; an edit that reads the bare output then needs a copy of it.
    reads = not torch.is_grad_enabled() and any("y" in op.method.arguments.get("branch", ()) for op in ops)
    bare = y.clone() if reads else y
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
            if "at" in m.arguments["branch"]:
                have["at"] = facts(op, frame)
            dy = apply(op, frame, "branch", have)
            dy = dy.reshape(*mine.shape[:-1], dy.shape[-1]) if op.rowed else dy
        if op.live is not None:
            dy = torch.where(
                op.live.view(-1, *[1] * (dy.dim() - 1)), dy, torch.zeros((), dtype=dy.dtype, device=dy.device)
            )
        dy = dy.to(y.dtype)
        if site.ranges and not is_shift(op.plan):
            wide = torch.zeros(*dy.shape[:-1], y.shape[-1], dtype=dy.dtype, device=dy.device)
            dy = wide.index_copy(-1, features(site, dy.device), dy)
        y = y + dy if rows is None else rows.add(y, dy)
    return y if bias is None else y + bias


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


def cut_features(y: Tensor, site: Any) -> Tensor:
    return y if not site.ranges else y.index_select(-1, features(site, y.device))


def _as_rows(value: Tensor, op: Op) -> Tensor:
    return value.reshape(_rows_of(op, value), -1, value.shape[-1]) if op.rowed else value


# -- around and exit --------------------------------------------------------------------------------------------


def around(ops: list[Op], frame: Frame, plain: Any, args: tuple, kwargs: dict) -> Any:
    """Edits around a block. The block runs for all rows, then each op's rows are chosen: a cache stays whole."""
    args, kwargs, x = _first_input(args, kwargs)
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
    taps = (frame.taps or {}).get(op.site.stack, {})
    if op.rows is None:
        new = apply(op, frame, "exit", {"taps": taps, "h": h, "at": facts(op, frame)}).to(h.dtype)
        return new if op.live is None else torch.where(op.live.view(-1, *[1] * (h.dim() - 1)), new, h)
    rows = op.rows
    mine = {block: rows.take(tap) for block, tap in taps.items()}
    new = apply(op, frame, "exit", {"taps": mine, "h": rows.take(h), "at": facts(op, frame)})
    return rows.put(h, new)


__all__ = ["dense_delta", "first", "frame_of", "run", "with_first"]
