"""Where flat tokens begin and end: which bases and calls can be flat, and the backbone on one row of tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import Unsupported

from ._attach import host_of
from ._attention import check
from ._collect import length_of, named_inputs
from ._flat import Layout
from ._frame import Frame, current, entered, local
from ._program import PORTS
from ._swap import HOST, kind, plain_class, swap
from ._tokens import position_offset

LEAST_PADDING = 0.02  # of all places: below it, a loop over sequences costs more than the padding
BY_TOKEN = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")  # (rows, tokens, ...)


@contextmanager
def flat_tokens(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Calls inside of the block compute no padding, where the base and the call allow it."""
    before, local.flat = local.flat, (host_of(model) if on and why_not_flat(model) is None else None)
    try:
        yield
    finally:
        local.flat = before


def why_not_flat(model: nn.Module) -> str | None:
    """Why no call of this model can be flat; None where it can. Reaches attentions and poolers, once for a model."""
    host = host_of(model)
    found = host.__dict__.get("_why_not_flat")
    if found is None:
        found = host.__dict__["_why_not_flat"] = _refusal(host)
        if not found:
            _reach(host)
    return found or None


def _refusal(host: Any) -> str:
    facts = host.anatomy.facts
    config = getattr(host.root, "config", None)
    if facts.encoder_decoder or len(facts.backbones) != 1 or len(facts.blocks) != 1:
        return "it has more than one stack, or none that is called by itself"
    takes = inspect.signature(plain_class(host.module(facts.backbones[0])).forward).parameters  # type: ignore[attr-defined]
    if "position_ids" not in takes or "attention_mask" not in takes:
        return "it counts positions by itself"
    if facts.positions not in ("absolute", "rotary"):
        return f"its positions are of the kind {facts.positions or 'unknown'!r}"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "mrope_section" in rope:
        return "its positions have several axes"
    if getattr(config, "attention_chunk_size", None):
        return "its attention is cut at multiples of a length"
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return "its attention is neither torch's own nor the eager one"
    attentions = _attentions(host)
    if len(attentions) != sum(len(blocks) for _, blocks in facts.blocks):
        return "something else than attention mixes the tokens of its blocks"
    try:
        for name in attentions:
            check(host.module(name), name)
    except Unsupported as error:
        return str(error)
    return ""


def _attentions(host: Any) -> list[str]:
    sites = host.anatomy.select("attention", port="attention")
    return list(
        dict.fromkeys(s.source or s.module for s in sites)
    )  # of a post-norm block, what its output layer reads


def _reach(host: Any) -> None:
    facts = host.anatomy.facts
    wanted = [(name, "attention") for name in _attentions(host)]
    wanted += [(facts.pooler, "pooler")] if facts.pooler else []
    for name, each in wanted:
        swap(host.module(name), name, host, each)
        host.swapped[name] = host.module(name)


def through(
    module: nn.Module, plain: Any, names: tuple[str, ...], frame: Frame, args: tuple, kwargs: dict
) -> Any:
    """A backbone's forward on flat tokens where that is asked for and possible, and its output in rows again."""
    if frame.flat is None or frame.flat is not frame.host or torch.compiler.is_compiling():
        return plain(module, *args, **kwargs)
    named = named_inputs(names, args, kwargs)
    layout = _layout(frame, named)
    if layout is None:
        return plain(module, *args, **kwargs)
    prefix = None if frame.prefix is None else frame.prefix.laid(layout.flat)
    with entered(replace(frame, layout=layout, prefix=prefix)):
        return layout.padded(plain(module, **_laid(module, names, named, layout)))


def _layout(frame: Frame, named: dict[str, Any]) -> Layout | None:
    """The layout of a call; None where it has something that is not known to be of tokens."""
    mask, ids = named.get("attention_mask"), named.get("input_ids")
    ids = named.get("inputs_embeds") if ids is None else ids
    if (
        not isinstance(mask, Tensor)
        or not isinstance(ids, Tensor)
        or mask.dim() != 2
        or mask.shape != ids.shape[:2]
    ):
        return None
    if length_of(named.get("past_key_values")) or named.get("output_attentions"):
        return None
    for name, value in named.items():
        if name in ("attention_mask", "cache_position") or not isinstance(value, Tensor) or not value.dim():
            continue
        shape = tuple(value.shape[:2])
        if name not in BY_TOKEN or (
            shape != mask.shape and (name, shape) != ("position_ids", (1, mask.shape[1]))
        ):
            return None
    if frame.prefix is not None and not frame.prefix.fits_rows(mask.shape):
        return None
    if not _serves_all(frame):
        return None
    real = mask.bool()
    lengths = real.sum(1)
    if int(lengths.sum()) > (1 - LEAST_PADDING) * mask.numel() or int(lengths.min()) == 0:
        return None
    return Layout(real)


def _serves_all(frame: Frame) -> bool:
    """Edits of some rows only, or with tensors of each row, have no rows to tell apart in one row of tokens."""
    return all(
        op.rows is None and not op.rowed and op.live is None
        for ops in frame.program.values()
        for port in PORTS
        for op in getattr(ops, port)
    )


def _laid(module: nn.Module, names: tuple[str, ...], named: dict[str, Any], layout: Layout) -> dict[str, Any]:
    laid = {k: v for k, v in named.items() if k not in ("cache_position", "past_key_values")}
    positions = laid.get("position_ids")
    if positions is None:
        positions = _positions(module, named, layout)
    laid["position_ids"] = positions.expand(layout.rows, -1)
    for name in BY_TOKEN:
        if laid.get(name) is not None:
            laid[name] = layout.flat(laid[name])
    laid["attention_mask"] = torch.ones(
        1, layout.total, dtype=named["attention_mask"].dtype, device=layout.index.device
    )
    if "use_cache" in names:
        laid["use_cache"] = False
    return laid


def _positions(module: nn.Module, named: dict[str, Any], layout: Layout) -> Tensor:
    """(rows or 1, tokens): what the base would count by itself."""
    offset, ids = position_offset(module), named.get("input_ids")
    if not offset or ids is None:
        return torch.arange(offset, offset + layout.tokens, device=layout.index.device)[None]
    real = (
        ids != offset - 1
    ).long()  # RoBERTa's and its like: from the padding token on, which has a place of its own
    return real.cumsum(1) * real + offset - 1


@kind("pooler")
def _pooler(base: type) -> dict[str, Any]:
    """A pooler reads whole rows, though the backbone that owns it is flat."""
    plain = base.forward  # type: ignore[attr-defined]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        frame = current(self.__dict__[HOST])
        if frame is None or frame.layout is None:
            return plain(self, *args, **kwargs)
        rows = frame.layout.padded
        with entered(replace(frame, layout=None)):
            return plain(self, *(rows(a) for a in args), **{k: rows(v) for k, v in kwargs.items()})

    return {"forward": forward}
