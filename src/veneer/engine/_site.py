"""What runs at an edited module: input edits, the base, weight edits, output edits, in this order.

Weight edits are functions of the *bare* W and add up; outputs are edited after all weight edits. So merging one of
two adapters leaves the other what it was.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ._around import around, leave
from ._dense import may_add, new_output, weighted, weighted_flat, with_added
from ._facts import apply, facts
from ._flat import laid_out
from ._frame import Frame, current, local
from ._outputs import cut_features, first, first_input, paste_features, with_first
from ._program import LATER, Op, SiteOps, adds_of
from ._residual import norm, residual, wants_residual
from ._swap import HOST, NAME, kind, kinds_of
from ._tokens import forget_rows, insert

_BY_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


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
    writable = new_output(base)

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__
        frame = local.frame
        if frame is None or frame.host is not state[HOST]:
            frame = frame_of(self)
            if frame is None:
                return plain(self, *args, **kwargs)
        ops = frame.program.get(state[NAME])
        if ops is None:
            return plain(self, *args, **kwargs)
        if ops.turned:
            return _run_turned(self, functools.partial(plain, self), ops, frame, args, kwargs)
        if ops.adds is not None and writable and may_add(frame, args):
            y = plain(self, *args, **kwargs)
            if ops.adds is LATER:
                ops.adds = adds_of(ops.weight)
            if ops.adds is not None and ops.adds.into(args[0], y):
                return y
            return with_added(self, ops.weight, frame, args[0], y)
        return run(self, functools.partial(plain, self), ops, frame, args, kwargs)

    return {"forward": forward}


def _run_turned(module: nn.Module, plain: Any, ops: SiteOps, frame: Frame, args: tuple, kwargs: dict) -> Any:
    """A module that is given (tokens, rows, width): its edits see (rows, tokens, width), the module its own."""

    def own(*args: Any, **kwargs: Any) -> Any:
        return _turned(plain(*_turned(args), **_turned(kwargs)))

    y = _turned(run(module, own, ops, frame, _turned(args), _turned(kwargs)))
    # A view of what a hand-written backward returned may not be written to, as the base is free to do.
    return y.clone() if isinstance(y, Tensor) and torch.is_grad_enabled() and y.requires_grad else y


def _turned(value: Any) -> Any:
    """The first two axes of all tensors exchanged, in tuples and dicts too. Its own inverse."""
    if isinstance(value, Tensor):
        return value.transpose(0, 1) if value.dim() > 1 else value
    if isinstance(value, tuple):
        return tuple(map(_turned, value))
    return {k: _turned(v) for k, v in value.items()} if type(value) is dict else value


def run(module: nn.Module, plain: Any, ops: SiteOps, frame: Frame, args: tuple, kwargs: dict) -> Any:
    """The module's forward under `ops`."""
    if ops.input or ops.capture or ops.output:
        args, kwargs, x = first_input(args, kwargs)
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
        y = with_first(y, paste_features(first(y), cut_features(part, site), site))
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
            have = {"x": seen, "y": mine}
            if wants_residual(op.method):
                have["residual"] = residual(op, frame, x)
            new = edit(op, frame, mine, "output", have)
            new = new if not op.site.ranges else paste_features(inner, new, op.site)
        y = with_first(y, new)
    return y


def _inner(module: nn.Module, plain: Any, ops: SiteOps, frame: Frame, args: tuple, kwargs: dict) -> Any:
    """The base under weight edits, or under edits around it."""
    if ops.around:
        return around(ops.around, frame, plain, args, kwargs)
    if ops.weight and frame.layout is not None:
        return weighted_flat(module, plain, ops.weight, frame, args, kwargs)
    if ops.weight:
        return weighted(module, plain, ops.weight, frame, args, kwargs)
    return plain(*args, **kwargs)


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


def edit(op: Op, frame: Frame, target: Tensor, function: str, have: dict[str, Any]) -> Tensor:
    """target with one input or output edit applied to the op's rows."""
    if frame.layout is None:
        return _edit(op, frame, target, function, have)
    names = list(have)

    def run(f: Frame, mine: Tensor, *values: Any) -> Tensor:
        return _edit(op, f, mine, function, dict(zip(names, values)))

    return laid_out(op, frame, function, run, target, *have.values())


def _edit(op: Op, frame: Frame, target: Tensor, function: str, have: dict[str, Any]) -> Tensor:
    wants_at = "at" in op.method.arguments[function] or "at" in op.method.arguments.get("derive", ())
    if not target.is_floating_point():
        return target
    given = {}
    for name, value in have.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = op.rows.take(value) if op.rows is not None else value
            value = _last_axis(value, op, frame)
        given[name] = value
    if wants_at:
        given["at"] = facts(op, frame)
        if wants_residual(op.method):
            given["at"] = given["at"].with_(_norm=norm(op, frame))
    mine = given["y" if function == "output" else "x"]
    new = apply(op, frame, function, given)
    new = _back(new, mine, target if op.rows is None else op.rows.take(target), op, frame).to(target.dtype)
    if op.live is not None:
        return torch.where(op.live.view(-1, *[1] * (target.dim() - 1)), new, target)
    return new if op.rows is None else op.rows.put(target, new)


def _last_axis(value: Tensor, op: Op, frame: Frame) -> Tensor:
    """Channels last for convolutions; (rows, tokens, width) where tensors have a row axis."""
    if _channels_first(op, frame, value):
        value = value.movedim(1, -1).flatten(1, 2)  # places of an image are its tokens
    if op.by_row:
        value = value.reshape(op.count or value.shape[0], -1, value.shape[-1])
    return value


def _channels_first(op: Op, frame: Frame, value: Tensor) -> bool:
    """Images as convolutions have them: (rows, channels, height, width). Edits see channels last."""
    if value.dim() != 4:
        return False
    width = op.site.width
    if op.site.kind == "conv" or (value.shape[-1] != width and value.shape[1] == width):
        return True
    # An image as wide as it has channels: what normalises by channel says which axis they are on.
    return op.site.kind == "norm" and isinstance(frame.host.module(op.site.module), _BY_CHANNEL)


def _back(new: Tensor, mine: Tensor, like: Tensor, op: Op, frame: Frame) -> Tensor:
    if _channels_first(op, frame, like):
        last = like.movedim(1, -1)
        return new.reshape(last.shape).movedim(-1, 1)
    return new.reshape(like.shape) if op.by_row else new
