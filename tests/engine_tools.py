"""What the engine's tests share: small double-precision bases, randomised adapters, outputs."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import transformers
from torch import Tensor

import veneer
import zoo

transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", message=".*pad_token_id.*")


@functools.cache
def _factories() -> dict[str, Any]:
    return zoo.zoo()


def base(family: str, double: bool = True) -> Any:
    """A tiny model of the family, in evaluation mode, dropout off."""
    model, _ = _factories()[family]()
    model = model.double() if double else model
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.eval()


def inputs(
    family: str, rows: int, tokens: int = 9, padding: str = "right", seed: int = 0
) -> dict[str, Tensor]:
    """Inputs of different lengths for a family of the zoo; positions are given where a base takes them."""
    generator = torch.Generator().manual_seed(seed)
    _, made = _factories()[family]()
    found: dict[str, Tensor] = {}
    for name, value in made.items():
        if name == "labels" or not isinstance(value, Tensor):
            continue
        if value.is_floating_point():
            found[name] = torch.randn(rows, *value.shape[1:], generator=generator, dtype=torch.float64)
        elif name.endswith("ids") and "type" not in name and "position" not in name:
            found[name] = torch.randint(5, 40, (rows, tokens), generator=generator)
    if "input_ids" in found and family not in ("clip",):
        mask = torch.ones(rows, tokens, dtype=torch.long)
        for i in range(rows):
            missing = i % 4
            if missing:
                mask[i, slice(0, missing) if padding == "left" else slice(tokens - missing, None)] = 0
        found["attention_mask"] = mask
        if family in ("llama", "gpt2", "qwen3", "gpt_neox", "phi3", "mixtral"):
            found["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return found


def out(model: Any, given: dict[str, Tensor], **more: Any) -> Tensor:
    """The logits, or the last hidden state."""
    y = model(**given, **more)
    if isinstance(y, Tensor):
        return y
    for name in ("logits", "last_hidden_state"):
        if hasattr(y, "keys") and name in y:
            return y[name]
    return y[0]


# Sizes for layers of width 32, of which the methods' own would be more than there is.
SMALL: dict[str, dict[str, Any]] = {"fourierft": {"frequencies": 24}, "shira": {"rank": 2}}


def add(model: Any, method: Any, name: str, seed: int = 0, size: float = 0.2, **options: Any) -> Any:
    """Attach an adapter and randomise all that it trains: a zero update would pass anything."""
    small = SMALL.get(method, {}) if isinstance(method, str) else {}
    adapter = veneer.attach(model, method, name=name, seed=seed, **{**small, **options})
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for value in adapter.named().values():
            value.add_(torch.randn(value.shape, generator=generator, dtype=value.dtype) * size)
    for leaf in adapter.leaves():
        torch.autograd.graph.increment_version(leaf)
    adapter._refresh()
    adapter.project()
    return adapter


def real(y: Tensor, mask: Tensor | None, row: int) -> Tensor:
    """A row's output at its real tokens."""
    if mask is None or y.dim() != 3 or y.shape[1] != mask.shape[1]:
        return y[row]
    return y[row][mask[row].bool()]
