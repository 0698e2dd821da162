"""Padding: from lists of different lengths to tensors, on either side, with the positions that padding asks
for.

Positions are given to every model that takes them, so that the same tokens are at the same positions
wherever the padding is. Models that count positions from the padding token themselves (RoBERTa and its
like) are left to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

IGNORED = -100  # the label of what is not trained


def pad(rows: Sequence[Sequence[Any]], value: Any, side: str = "right", dtype: Any = torch.long) -> Tensor:
    """Lists of numbers -> (rows, longest), filled with `value` on one side."""
    longest = max(len(row) for row in rows)
    filled = []
    for row in rows:
        gap = [value] * (longest - len(row))
        filled.append([*row, *gap] if side == "right" else [*gap, *row])
    return torch.tensor(filled, dtype=dtype)


def text_inputs(
    features: Sequence[dict[str, Any]], tokenizer: Any, model: nn.Module | None, side: str = "right"
) -> dict[str, Tensor]:
    """input_ids, attention_mask, and token_type_ids and position_ids where the model takes them."""
    ids = [f["input_ids"] for f in features]
    inputs = {"input_ids": pad(ids, pad_id(tokenizer), side)}
    inputs["attention_mask"] = pad([[1] * len(row) for row in ids], 0, side)
    if "token_type_ids" in features[0] and (model is None or takes(model, "token_type_ids")):
        inputs["token_type_ids"] = pad([f["token_type_ids"] for f in features], 0, side)
    if model is not None and wants_positions(model):
        inputs["position_ids"] = positions(inputs["attention_mask"])
    return inputs


def positions(mask: Tensor) -> Tensor:
    """(rows, tokens) mask -> place of each token among the real ones; padding shares that of a neighbour."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def cut_rows(encoded: Any, longest: int) -> int:
    """How many rows a tokenizer cut; those of exactly the longest length count too where it does not say."""
    if getattr(encoded, "encodings", None):
        return sum(bool(e.overflowing) for e in encoded.encodings)
    return sum(len(ids) >= longest for ids in encoded["input_ids"])


def pad_id(tokenizer: Any) -> int:
    """The padding id, or the end's, or 0: padding is masked, so that any id serves."""
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    return 0


def forward_names(model: nn.Module) -> set[str]:
    """Argument names of the forward, as the base's own class spells them (a wrapper may say **kwargs)."""
    names: set[str] = set()
    for cls in type(model).__mro__:
        if cls is nn.Module:
            break
        if "forward" in vars(cls):
            parameters = inspect.signature(vars(cls)["forward"]).parameters.values()
            named = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self"}
            names |= named
            if named:
                break
    return names


def takes(model: nn.Module, name: str) -> bool:
    return name in forward_names(model)


_WANTS: WeakKeyDictionary[nn.Module, tuple[type, bool]] = WeakKeyDictionary()


def wants_positions(model: nn.Module) -> bool:
    """Takes one position a token, counted from 0. Found once for a model: its modules are looked through for it."""
    known = _WANTS.get(model)
    if known is None or known[0] is not type(model):
        known = _WANTS[model] = (type(model), _wants_positions(model))
    return known[1]


def _wants_positions(model: nn.Module) -> bool:
    if not takes(model, "position_ids") or _counts_from_padding(model):
        return False
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return "mrope_section" not in rope


def positions_of(model: nn.Module) -> int | None:
    """How many positions the model can tell apart, where it says so."""
    found = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(found, int) or found <= 0:
        return None
    # Those that count from the padding token have their first positions behind its id.
    padding = getattr(model.config, "pad_token_id", None) or 0  # type: ignore[union-attr]
    return found - padding - 1 if _counts_from_padding(model) else found


def _counts_from_padding(model: nn.Module) -> bool:
    return any(
        isinstance(module, nn.Embedding) and module.padding_idx is not None and "position" in name
        for name, module in model.named_modules()
    )
