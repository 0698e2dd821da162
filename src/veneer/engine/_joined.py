"""Calls whose rows are single tokens: those of rows that speak and of prompts that are read, side by side.

A loop that keeps its own cache gives (tokens, 1) ids and a name for each token. What treats every token by itself
needs no more than that; attention is the loop's own, which knows what belongs together.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._attach import host_of
from ._flat_calls import why_not_flat
from ._frame import Frame
from ._outputs import first, with_first
from ._swap import swap


def why_not_joined(model: nn.Module) -> str | None:
    """Why no call of this model can be of single tokens; None where it can. Reaches what such calls need."""
    found = host_of(model)
    reason = why_not_flat(model)
    if reason is None:
        for name, kind in (("", "door"), *((name, "backbone") for name in found.anatomy.facts.backbones)):
            module = found.root if name == "" else found.module(name)
            swap(module, name, found, kind)
            found.swapped[name] = module
    return reason


def kept(frame: Frame, y: Any) -> Any:
    """A backbone's output, of the tokens alone whose logits the loop wants."""
    keep: Tensor | None = None if frame.session is None else frame.session.keep
    return y if keep is None else with_first(y, first(y).index_select(0, keep))
