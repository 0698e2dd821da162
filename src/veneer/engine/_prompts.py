"""Prompts at a backbone: the named arguments of its forward with added positions, and its output cut back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veneer.edits import At
from veneer.errors import Unsupported

from ._collect import length_of, named_inputs
from ._frame import Frame
from ._outputs import first, with_first
from ._swap import NAME
from ._tokens import extend_facts, extend_mask, extend_positions, forget_rows, insert, position_offset


def shift_positions(
    host: Any, names: tuple[str, ...], frame: Frame, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    """Positions that start behind a prefix, where an attention edit says so (prefixes that were served as a cache)."""
    if "position_ids" not in names or frame.captured.get("shifted") is not None:
        return args, kwargs
    offsets: dict[Any, tuple[Any, int]] = {}
    for ops in frame.program.values():
        for op in ops.attention:
            offset = getattr(op.method, "position_offset", 0)
            if offset:
                offsets[(id(op.adapter), id(op.rows))] = (op, offset)
    if not offsets:
        return args, kwargs
    frame.captured["shifted"] = True
    named = named_inputs(names, args, kwargs)
    given, source = named.get("position_ids"), named.get("input_ids")
    source = named.get("inputs_embeds") if source is None else source
    rows, tokens = source.shape[:2]  # type: ignore[union-attr]
    if given is None:
        past = length_of(named.get("past_key_values"))
        given = torch.arange(past, past + tokens, device=source.device)[None]  # type: ignore[union-attr]
    shift = torch.zeros(rows, 1, dtype=given.dtype, device=given.device)
    for op, offset in offsets.values():
        if op.rows is None:
            shift = shift + (offset if op.live is None else offset * op.live.long()[:, None])
        else:
            shift = op.rows.add(shift, torch.full_like(op.rows.take(shift), offset))
    return (), {**named, "position_ids": given.expand(rows, -1) + shift}


def token_ops(host: Any, module: nn.Module, frame: Frame) -> tuple[str, list[Any]]:
    """The token edits of the stack that `module` owns."""
    own = module.__dict__[NAME]
    for stack, embedding in host.anatomy.facts.embeddings:
        inside = embedding == own or not own or embedding.startswith(own + ".")
        at = frame.program.get(embedding)
        if inside and at is not None and at.tokens and host.has_token_ids(stack):
            return stack, at.tokens
    return "", []


def put_in(
    host: Any, module: Any, stack: str, ops: list[Any], frame: Frame, named: dict, accepts: tuple[str, ...]
) -> tuple[dict, Any]:
    """The named arguments of a forward with prompts in front: embeddings, mask, positions and types extended."""
    named = dict(named)
    ids, embeds = named.pop("input_ids", None), named.pop("inputs_embeds", None)
    if embeds is None:
        embeds = host.module(dict(host.anatomy.facts.token_embeddings)[stack])(ids)
    rows, tokens = embeds.shape[:2]
    mask = named.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise Unsupported(
            f"prompts need an attention mask of shape (rows, tokens); this one is {tuple(mask.shape)}.",
            next_step="attention_mask=(input_ids != pad_token_id)",
        )
    at = frame.at.get(stack) or frame.at.get("") or At()
    frame.at[stack] = at.with_(ids=ids) if ids is not None else at
    embeds, where = insert(ops, frame, embeds, mask)
    longer = extend_mask(mask, where, rows, tokens, embeds.device)
    named["inputs_embeds"], named["attention_mask"] = embeds, longer
    if named.get("token_type_ids") is not None:
        named["token_type_ids"] = where.extend(named["token_type_ids"], fill=0, at_added=0)
    if "position_ids" in accepts and host.anatomy.facts.positions in ("absolute", "rotary"):
        named["position_ids"] = extend_positions(
            named.get("position_ids"), longer, where, position_offset(module)
        )
    named.pop("cache_position", None)
    frame.at[stack] = extend_facts(frame.at[stack], where, longer.bool())
    forget_rows(frame)
    return named, where


def extend_for_cache(host: Any, module: Any, ops: list[Any], frame: Frame, named: dict, past: int) -> dict:
    """A later step of somebody's own decoding loop: the cache is longer than the mask that they keep."""
    mask = named.get("attention_mask")
    if mask is None:
        return named
    new = named.get("input_ids")
    new = named["inputs_embeds"] if new is None else new
    empty = torch.zeros(mask.shape[0], mask.shape[1], 1, dtype=host.dtype, device=mask.device)
    width = host.anatomy.facts.width
    _, where = insert(ops, frame, empty.expand(-1, -1, width), mask)
    longer = extend_mask(mask, where, mask.shape[0], mask.shape[1], mask.device)
    named = {**named, "attention_mask": longer}
    if named.get("position_ids") is not None:
        named["position_ids"] = named["position_ids"] + where.counts[:, None]
    return named


def cut_back(y: Any, where: Any) -> Any:
    y = with_first(y, where.cut_back(first(y)))
    if hasattr(y, "keys") and y.get("hidden_states") is not None and isinstance(y["hidden_states"], tuple):
        y["hidden_states"] = tuple(where.cut_back(h) for h in y["hidden_states"])
    return y
