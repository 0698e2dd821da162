"""What a training step will hold, from a look at a few tokens: activations are seen, not assumed.

Methods keep from half to twice of what one formula says, since it is the edits, not the base, that ask for stored
inputs. So the method is attached for a moment, two short batches go through the model, and what autograd keeps of each
is counted: one part grows with the tokens, the other with the tokens of a row squared (scores, where attention stores
them).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer import engine
from veneer.errors import VeneerError
from veneer.training._evaluate import evaluating
from veneer.training._seeds import own_randomness

ROWS, SHORT, LONG = 2, 24, 48  # of the two batches that are looked at


@dataclass(frozen=True)
class Kept:
    """Bytes that a step keeps for its backward, and those of the largest tensor among them."""

    bytes: int
    largest: int


def step_memory(
    model: nn.Module, method: Any, options: Mapping[str, Any] | None = None, *, rows: int = 8, length: int = 256,
    copies: int = 0,
) -> dict[str, int]:  # fmt: skip
    """Bytes of a training step of `rows` x `length` tokens, by what they hold, and their total. By a look where the
    model takes token ids, else by the formula of `veneer.anatomy.memory`. copies: bytes of a form of the matmul.
    """
    plan = engine.plan(model, method, **(options or {}))
    kept = kept_by_method(model, method, options or {}, rows, length)
    more = {} if kept is None else {"kept": kept.bytes, "largest": kept.largest}
    held = sum(p.untyped_storage().nbytes() for p in _apart(model))
    return plan.memory(batch_size=rows, length=length, copies=copies, bytes_of_weights=held, **more)


def _apart(model: nn.Module) -> list[Tensor]:
    """The model's tensors, each storage once."""
    found = {t.untyped_storage()._cdata: t for t in (*model.parameters(), *model.buffers())}
    return list(found.values())


def kept_by_method(
    model: nn.Module, method: Any, options: Mapping[str, Any], rows: int, length: int
) -> Kept | None:
    """What a method keeps that is not on the model: it is attached for the look, and taken off again."""
    name = "forecast"
    while name in engine.adapters(model):
        name += "_"
    active = engine.host_of(model).active if engine.adapters(model) else ()
    with own_randomness(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            engine.attach(model, method, name=name, **options)
            return kept(model, rows, length)
        except VeneerError:  # it begins with data, or needs facts that no random tokens have
            return None
        finally:
            if name in engine.adapters(model):
                engine.detach(model, name)
            if active:
                engine.activate(model, active)


def kept(model: nn.Module, rows: int, length: int) -> Kept | None:
    """What a step of the adapted model keeps; None where it takes no token ids, or does not run on random ones."""
    short, long = (_looked(model, tokens) for tokens in (SHORT, LONG))
    if short is None or long is None:
        return None

    def at_length(few: int, many: int) -> int:
        """few = ROWS (a SHORT + c SHORT^2), many = ROWS (a LONG + c LONG^2) -> rows (a length + c length^2)"""
        c = max(0.0, (many / LONG - few / SHORT) / (ROWS * (LONG - SHORT)))
        a = few / (ROWS * SHORT) - c * SHORT
        return max(0, round(rows * (a * length + c * length * length)))

    return Kept(at_length(sum(short), sum(long)), at_length(max(short, default=0), max(long, default=0)))


def _looked(model: nn.Module, tokens: int) -> list[int] | None:
    """Bytes of each storage that autograd keeps of one forward, those of the model's own tensors left out."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found: dict[int, tuple[Any, int]] = {}  # held, so that no storage gets the address of another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage, storage.nbytes()
        return tensor

    device = next(model.parameters()).device
    with own_randomness(), evaluating(model), torch.enable_grad():
        model.train()
        generator = torch.Generator().manual_seed(0)
        ids = max(2, engine.host_of(model).anatomy.facts.vocabulary)
        given = torch.randint(1, ids, (ROWS, tokens), generator=generator).to(device)
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                model(input_ids=given, attention_mask=torch.ones_like(given))
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError):
            return None
    return [size for _, size in found.values()]
