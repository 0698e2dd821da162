"""The attention port: methods that edit q, k, v, the mask or the result of an attention.

It stands on transformers' attention interface. A swapped attention shows a `config` that names our function; the
shared config and the making of masks are not touched. Attentions that do not use the interface get an error that
says so, at attach.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.edits import split_heads
from veneer.errors import Unsupported

from ._facts import apply, facts
from ._flat import Layout, by_sequence, in_rows, mask_in_rows
from ._frame import Frame
from ._program import Op, by_rows
from ._rows import Rows
from ._site import frame_of
from ._swap import HOST, NAME, kind, plain_class

NAME_OF_OURS = "veneer"


class _Config:
    """The attention's own config, but for the implementation that it names."""

    def __init__(self, config: Any) -> None:
        object.__setattr__(self, "_config", config)

    def __getattr__(self, name: str) -> Any:
        if name == "_config":
            raise AttributeError(name)
        return NAME_OF_OURS if name == "_attn_implementation" else getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


@kind("attention")
def _attention(base: type) -> dict[str, Any]:
    plain = base.forward  # type: ignore[attr-defined]

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        frame = frame_of(self)
        if frame is None or not _has_work(self, frame):
            return plain(self, *args, **kwargs)
        # What entered the module, for edits that gate on it; a block runs once at a time, so one place is enough.
        entered = args[0] if args else kwargs.get("hidden_states", kwargs.get("query"))
        key = ("hidden", self.__dict__[NAME])
        frame.captured[key] = entered
        try:
            return plain(self, *args, **kwargs)
        finally:  # kept to the end of the call it would be one more tensor a block
            frame.captured.pop(key, None)

    def config(self: Any) -> Any:
        own = self.__dict__["config"]
        frame = frame_of(self)
        return _Config(own) if frame is not None and _has_work(self, frame) else own

    def set_config(self: Any, value: Any) -> None:
        self.__dict__["config"] = value

    return {"forward": forward, "config": property(config, set_config)}


def _has_work(module: nn.Module, frame: Frame) -> bool:
    ops = frame.program.get(module.__dict__[NAME])
    return (
        bool(ops is not None and ops.attention)
        or bool(frame.key_mask or _own(frame))
        or frame.layout is not None
    )


def _own(frame: Frame) -> Any:
    """The attention that a loop brings."""
    return None if frame.session is None else frame.session.attend


def check(module: nn.Module, name: str) -> None:
    """Refuse attentions that the port cannot reach."""
    used = _names_used(plain_class(module)) if "config" in module.__dict__ else ()
    if "ALL_ATTENTION_FUNCTIONS" not in used and "get_interface" not in used:
        raise Unsupported(
            f"the attention '{name}' ({plain_class(module).__name__}) does not call transformers' attention interface, "
            "so its keys and values cannot be reached.",
            next_step="use a method of another port, or a base whose attention uses the interface",
        )
    register()


@functools.cache
def _names_used(kind: type) -> frozenset[str]:
    """Globals and attributes that the class's functions name.

    Read from the code objects: the source would be parsed whole at each attach, and Python 3.11's parser keeps
    its depth in a place that all threads share, so that two threads that load at once can see it fail.
    """
    found: set[str] = set()
    codes = [f.__code__ for f in map(inspect.unwrap, vars(kind).values()) if inspect.isfunction(f)]
    while codes:
        code = codes.pop()
        found.update(code.co_names)
        codes += [c for c in code.co_consts if inspect.iscode(c)]
    return frozenset(found)


def register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME_OF_OURS not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME_OF_OURS, attention)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: q, k, v (rows, heads, tokens, d) -> output (rows, tokens, heads, d)."""
    base, eager = _implementation(module)
    frame = frame_of(module)
    if frame is not None and _own(frame):
        base, eager = _own(frame), False
    ops = frame.program.get(module.__dict__[NAME]) if frame is not None else None
    layout = None if frame is None else frame.layout
    if frame is None or (not frame.key_mask and not (ops and ops.attention)):
        if layout is not None:
            return by_sequence(base, layout, module, query, key, value, mask, kwargs)
        return base(module, query, key, value, mask, **kwargs)
    if layout is not None:  # its edits see rows
        frame, mask = replace(frame, layout=None), _flat_mask(module, layout, query, key, mask, kwargs)
        query, key, value = (in_rows(layout, x) for x in (query, key, value))
        hidden = ("hidden", module.__dict__[NAME])
        frame.captured[hidden] = layout.padded(frame.captured.get(hidden))
    bias = kwargs.pop("position_bias", None)
    mask = _whole_mask(module, query, key, mask, bias, kwargs)
    mask = _close_added(frame, module, mask, key)
    dropout = kwargs.pop("dropout", 0.0)
    kwargs["is_causal"] = False
    weights: list[Any] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor, scale: float | None = None) -> Tensor:
        """q: (rows, heads, tokens, d), k, v: (rows, kv_heads, keys, d) -> (rows, heads, tokens, d)"""
        m = _as_float(m, q.dtype) if eager else m
        extra = {**kwargs, **({} if scale is None else {"scaling": scale})}
        if eager:
            extra.pop("is_causal")
        out, w = base(module, q, k, v, m.expand(q.shape[0], *m.shape[1:]), dropout=dropout, **extra)
        weights.append(w)
        return out.transpose(1, 2)

    out: Tensor | None = None
    live = ops.attention if ops else []
    bare = _bare_rows(live, query.shape[0])
    if bare is None:
        out = attend(query, key, value, mask)
    elif bare.indices:
        part = attend(bare.take(query), bare.take(key), bare.take(value), _rows_of_mask(bare, mask))
        out = bare.put(part.new_zeros(query.shape[0], *part.shape[1:]), part)
    for inner in _nested(live):
        new = _run(module, frame, inner, query, key, value, mask, attend)
        rows = inner[0].rows
        if rows is None:
            out = new
        else:
            out = new.new_zeros(query.shape[0], *new.shape[1:]) if out is None else out
            out = rows.put(out, new)
    assert out is not None
    out = out.transpose(1, 2)
    if layout is not None:
        return layout.flat(out), None
    return out.contiguous(), weights[0] if len(weights) == 1 else None


def _flat_mask(
    module: nn.Module, layout: Layout, q: Tensor, k: Tensor, mask: Tensor | None, kwargs: dict
) -> Tensor:
    """The whole mask of the padded rows, from that of the flat tokens."""
    if mask is not None:
        return mask_in_rows(layout, mask)
    row = q.new_empty(1, 1, layout.tokens, 1)
    whole = _whole_mask(module, row, row, None, None, kwargs) & layout.mask[:, None, None]
    every = torch.arange(layout.tokens, device=q.device)
    whole[:, :, every, every] = True  # padding sees itself: no softmax over nothing
    return whole


def _nested(ops: list[Op]) -> list[list[Op]]:
    """Ops that touch the same rows run inside one another; rows with different stacks are groups of their own."""
    whole = [op for op in ops if op.rows is None]
    parts = [op for op in ops if op.rows is not None]
    if not parts:
        return [whole] if whole else []
    total = parts[0].rows.total  # type: ignore[union-attr]
    return [[_narrowed(op, rows) for op in members] for rows, members in by_rows(ops, total)]


def _narrowed(op: Op, rows: Rows) -> Op:
    """The op on a subset of its rows."""
    if op.rows is not None and op.rows.indices == rows.indices:
        return op
    mine = op.rows.indices if op.rows is not None else tuple(range(rows.total))
    return op.for_rows(rows, [(row, mine.index(row)) for row in rows.indices])


def _bare_rows(ops: list[Op], total: int) -> Rows | None:
    """The rows that no op touches; None where that is all of them."""
    if not ops:
        return None
    touched: set[int] = set()
    for op in ops:
        if op.rows is None:
            return Rows((), total)
        each = total // op.rows.total
        touched.update(i * each + j for i in op.rows.indices for j in range(each))
    return Rows([i for i in range(total) if i not in touched], total)


def _run(
    module: nn.Module,
    frame: Frame,
    ops: list[Op],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    attend: Callable[..., Tensor],
) -> Tensor:
    """A stack of attention edits on the same rows: the last of the list is the outermost."""
    rows = ops[0].rows
    if rows is not None:
        q, k, v, mask = rows.take(q), rows.take(k), rows.take(v), _rows_of_mask(rows, mask)
    inner: Callable[..., Tensor] = attend
    hidden = frame.captured.get(("hidden", module.__dict__[NAME]))
    for op in ops:
        at = facts(op, frame).with_(
            hidden=None if hidden is None else (rows.take(hidden) if rows is not None else hidden),
            _project=functools.partial(_project, frame, op),
        )
        inner = functools.partial(_one, op, frame, at, inner)
    return inner(q, k, v, mask)


def _one(
    op: Op,
    frame: Frame,
    at: Any,
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
) -> Tensor:
    out = apply(op, frame, "attention", {"q": q, "k": k, "v": v, "mask": mask, "attend": attend, "at": at})
    return out if op.live is None else torch.where(op.live.view(-1, 1, 1, 1), out, attend(q, k, v, mask))


def _project(frame: Frame, op: Op, role: str, z: Tensor) -> Tensor:
    """The site's own frozen projection of z, before rotary: (..., width) -> (..., heads, head_dim)."""
    projection = frame.host.sibling(op.site, role)
    W = frame.host.weight(projection).to(z.dtype)
    y = z @ W.mT
    b = frame.host.bias(projection)
    y = y if b is None else y + b.to(y.dtype)
    heads = op.site.heads if role == "query" else op.site.kv_heads
    return y.unflatten(-1, (heads, -1))


def _whole_mask(
    module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, kwargs: dict
) -> Tensor:
    """A mask that says everything: causality where the base left it to a flag, and the position bias."""
    queries, keys = q.shape[2], k.shape[2]
    if mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if causal and queries > 1:
            past = max(0, keys - queries)
            row = torch.arange(queries, device=q.device)[:, None] + past
            column = torch.arange(keys, device=q.device)[None]
            mask = column <= row
            window = kwargs.get("sliding_window")
            if window is not None:
                mask = mask & (column > row - window)
            mask = mask[None, None]
        else:
            mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=q.device)
    mask = mask[..., :keys]
    if bias is not None:
        bias = bias[..., -queries:, :keys]
        mask = _as_float(mask, q.dtype) + bias.to(q.dtype)
    return mask


def _close_added(frame: Frame, module: nn.Module, mask: Tensor, k: Tensor) -> Tensor:
    """Close the keys of padding that a `tokens` edit had to add where the base has no mask."""
    closed = frame.key_mask.get(frame.host.stack_of(module.__dict__[NAME]))
    if closed is None or closed.shape[1] != k.shape[2]:
        return mask
    if mask.dtype == torch.bool:
        return mask & closed[:, None, None, :]
    return mask.masked_fill(~closed[:, None, None, :], torch.finfo(mask.dtype).min)


def _rows_of_mask(rows: Rows, mask: Tensor) -> Tensor:
    return mask if mask.shape[0] == 1 else rows.take(mask)


def _as_float(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _implementation(module: nn.Module) -> tuple[Callable[..., Any], bool]:
    """The base's own attention function, and whether it is the eager one (which takes float masks only)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.__dict__["config"]._attn_implementation
    if name in (None, "eager"):
        home = sys.modules[plain_class(module).__module__]
        return home.eager_attention_forward, True
    return ALL_ATTENTION_FUNCTIONS[name], False


__all__ = ["HOST", "attention", "check", "split_heads"]
