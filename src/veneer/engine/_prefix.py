"""The frozen prefix: what the base computes below the lowest edited site, recorded once and played back.

An adapter that edits nothing below block k leaves the states that enter block k those of the bare base. They can be
recorded in a bare forward that stops there, and played back later: blocks below k then do nothing, and block k - 1
answers with what was kept. An edit at the exit reads what all blocks left, so all of it is kept for it.

A *place* is a number: place b is what enters block b, and the last place what the last block leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._attach import host_of
from ._frame import local
from ._outputs import first, with_first


@dataclass(frozen=True)
class Prefix:
    """Blocks before `block` of `stack` are frozen for an adapter; `places` are the states that stand for them."""

    stack: str
    block: int
    places: tuple[int, ...]


def frozen_prefix(model: nn.Module, names: Iterable[str]) -> Prefix | None:
    """The part of the base that none of these adapters can change, or None where there is nothing to gain.

    Read off their plans and the order of the blocks. Only for bases with one stack, whose blocks run once each.
    """
    host = host_of(model)
    facts = host.anatomy.facts
    if len(facts.blocks) != 1 or facts.encoder_decoder or host.merged:
        return None
    stack, blocks = facts.blocks[0]
    behind = tuple(
        n for n in (facts.head, facts.pooler, *(m for _, m in facts.finals)) if n and n not in blocks
    )
    lowest, reads_all = len(blocks), False
    for name in names:
        for sp in host.adapter(name).plan.sites:
            site = sp.site
            if site.port == "exit":
                reads_all = True
            elif site.block is not None and site.stack == stack:
                lowest = min(lowest, site.block)
            elif not any(site.module == n or site.module.startswith(n + ".") for n in behind):
                return None
    if lowest == 0:
        return None
    return Prefix(stack, lowest, tuple(range(len(blocks) + 1)) if reads_all else (lowest,))


class Recording:
    """States at some places of one bare forward, which ends behind the last of them. `plain`: what blocks return."""

    def __init__(self, prefix: Prefix) -> None:
        self.prefix, self.until = prefix, max(prefix.places)
        self.states: dict[int, Tensor] = {}
        self.plain: dict[int, Any] = {}
        self.next, self.fits = 0, True
        self.last: int | None = None

    def fits_rows(self, shape: Sequence[int]) -> bool:
        return False  # states are kept in rows

    def block(self, number: int, entering: Any, run: Any) -> Any:
        """A block's call, watched: blocks run in their order, each on what the one before it left."""
        y = run()
        in_order = number == self.next and isinstance(entering, Tensor) and self.last in (None, id(entering))
        rest = y[1:] if isinstance(y, (tuple, list)) else () if isinstance(y, Tensor) else (y,)
        self.fits = self.fits and in_order and all(r is None for r in rest)
        if not self.fits:
            raise Enough
        if number == 0:
            self._keep(0, entering)
        self.next, self.last = number + 1, id(first(y))
        self.plain[number] = None if isinstance(y, Tensor) else with_first(y, None)  # type: ignore[arg-type]
        self._keep(number + 1, first(y))
        if number + 1 == self.until:
            raise Enough
        return y

    def _keep(self, place: int, x: Tensor) -> None:
        if place in self.prefix.places:
            self.states[place] = x.detach()


class Playing:
    """Kept states in the place of frozen blocks. shapes: what blocks return beside the states, from a recording."""

    def __init__(self, prefix: Prefix, states: Mapping[int, Tensor], shapes: Mapping[int, Any]) -> None:
        self.prefix, self.states, self.shapes = prefix, states, shapes

    def laid(self, flat: Callable[[Tensor], Tensor]) -> Playing:
        """The same states for a backbone whose tokens are flat."""
        return Playing(self.prefix, {place: flat(x) for place, x in self.states.items()}, self.shapes)

    def fits_rows(self, shape: Sequence[int]) -> bool:
        return all(tuple(x.shape[:2]) == tuple(shape) for x in self.states.values())

    def block(self, number: int, entering: Any, run: Any) -> Any:
        if number >= self.prefix.block:
            return run()
        new = self.states.get(number + 1, entering)
        shape = self.shapes.get(number)
        return new if shape is None else with_first(shape, new)


class Enough(BaseException):
    """Ends a forward from inside; no `except Exception` on the way takes it."""


@contextmanager
def _placed(prefix: Any) -> Iterator[None]:
    before, local.prefix = local.prefix, prefix
    try:
        yield
    finally:
        local.prefix = before


def record_prefix(model: nn.Module, prefix: Prefix, inputs: Mapping[str, Any]) -> Recording | None:
    """The states of a batch at the prefix's places, of the bare base, without gradients. None where blocks do not run
    once each in their order, or hand on more than one tensor: such a base has no prefix that could be kept.
    """
    from ._api import bare

    made = Recording(prefix)
    try:
        with torch.no_grad(), bare(model), _placed(made):
            model(**inputs)
    except Enough:
        pass
    return made if made.fits and set(prefix.places) <= made.states.keys() else None


@contextmanager
def playing(
    model: nn.Module, prefix: Prefix, states: Mapping[int, Tensor], shapes: Mapping[int, Any]
) -> Iterator[None]:
    """Calls inside of the block take `states` in the place of the prefix. states: {place: (rows, tokens, width)}."""
    with _placed(Playing(prefix, states, shapes)):
        yield
